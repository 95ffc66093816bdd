"""What ``benchmarks/quantization.py`` compares: rows, other programs and their formats, and the one judge of all."""
