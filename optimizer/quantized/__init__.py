"""Quantized checkpoints as model sources: each format's tensors to the integers, scales and zero points they hold."""
