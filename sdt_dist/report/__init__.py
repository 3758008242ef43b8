"""Reports of runs as sections of blocks, rendered as one HTML page and as Markdown.

May import: evaluation and below. Reads result files only. To add a part: a function that returns blocks (`blocks.py`) and its
place in `run.py` or `changes.py`; a cell carries its full numbers, by which a test recomputes it from the samples.
"""
