"""Serves a build directory; needs no torch and none of the compiler."""
