"""Learning from measured recipes: the noise model and the graph network."""
