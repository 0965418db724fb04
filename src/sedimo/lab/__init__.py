"""The bench: one model, what is measured of it, and where that is kept."""
