"""Benchmarks of every figure that has a bound. `python -m benchmarks` runs them all."""
