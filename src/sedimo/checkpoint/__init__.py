"""Checkpoints: written, checked, loaded by diffusers."""
