"""Figures of runs, drawn from their result files: every point was measured.

May import: report, evaluation and below, matplotlib. To add a figure: a function from a `Run` to a figure (None where the run
has nothing to draw) and its name in `draw.py`.
"""
