"""The seam to diffusion pipelines, and what is recorded from them."""
