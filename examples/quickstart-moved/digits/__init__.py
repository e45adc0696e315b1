"""Handwritten digits, a Flower app with PyTorch."""
