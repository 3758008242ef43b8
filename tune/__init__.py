"""Sweeps with Ray Tune (none yet)."""
