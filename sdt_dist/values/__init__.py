"""Evidence that searches share: finished walks by key, a grow-only set, and what is derived from it.

May import: tree and below. It must not know models, searches in progress, or Ray.
To add a fact to a walk: a field of `WalkRecord` in `records.py`, its column in `files.py` (with the next format number, and a
file of before that still loads), and its place in the laws of `tests/property/test_sharing.py`.
"""
