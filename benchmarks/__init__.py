"""Comparisons of llmopt's engines with other programs, one command each."""
