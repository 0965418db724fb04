"""A graph neural network that predicts quality from a recipe, and what it says of each choice."""
