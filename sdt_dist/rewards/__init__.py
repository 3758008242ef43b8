"""Rewards of finished samples: named raw terms with multipliers, and the parsing of REWARD SPEC.

May import: metrics, data (scales), protocols and below. A reward sees context and sample, never the truth.
To add a term: a `Reward` with `components` and `multipliers`, a line in `spec.py`, and a test against values by hand.
"""
