"""Comparisons and measurements, one command each: ``python -m llmopt.benchmarks.NAME``; ``make bench`` runs all."""
