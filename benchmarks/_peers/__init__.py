"""Adapters of `benchmarks/peers.py`: other tools' quantized weights, brought to one form and measured alike."""
