"""Sweeps with Ray Tune and Optuna over trials that share one fleet.

May import: actors and the library. To add an objective: a line in `objectives.py`, a measure that does not move with what is
swept; a parameter: nothing, since the fields of a method's options are the space (`space.py`).
"""
