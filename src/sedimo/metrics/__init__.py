"""Measures of signals and of image distributions."""
