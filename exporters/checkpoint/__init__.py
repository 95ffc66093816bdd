"""Checkpoints that other programs load: which tensors and configs each format has, and how they are written."""
