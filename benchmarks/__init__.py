"""Measurements as ratios or figures of one run; `python -m benchmarks` lists and runs them."""
