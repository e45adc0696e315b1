"""Benchmarks: every figure a bound speaks of, as ratios in one run. `python -m benchmarks` prints them all."""
