"""Handwritten digits, and a network of which four widths are trained."""
