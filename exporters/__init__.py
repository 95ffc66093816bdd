"""Turns a model into files other programs execute or load."""
