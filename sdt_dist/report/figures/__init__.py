"""Figures of runs, drawn from their result files."""
