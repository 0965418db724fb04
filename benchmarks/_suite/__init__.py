"""Parts of `generalization.py`: the models, what is measured of each, and the tables."""
