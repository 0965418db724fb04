"""Running the denoiser: trials, probes, studies, campaigns."""
