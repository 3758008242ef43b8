"""Kinds of problems: their contexts, what is measured of their samples, and how that is shown.

May import: rewards, metrics, data and below; never models, search or evaluation, which ask a task and know no kind of problem.
To add one: a module with a `Task` (`task.py` says what it answers), its line in `registry.py`, and a test that no reward sees
the truth. Its context is made of parts (`sdt_dist.parts`), so that a prompt may mix text and series.
"""
