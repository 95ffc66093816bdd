"""Accuracy, fidelity and speed of a build, and the gates that judge them."""
