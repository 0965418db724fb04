"""The denoiser as a graph: found, labelled, counted."""
