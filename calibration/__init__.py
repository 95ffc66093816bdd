"""Runs a model layer by layer, and the texts it is run on."""
