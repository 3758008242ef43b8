"""Measures of forecasts and texts, by library code.

May import: protocols and below; it must not know runs. `forecast` scores samples against a truth, `spectrum` compares power
spectra, `aggregate` turns values of problems into means with bootstrap intervals, `text` measures language samples.
To add a measure: a function here, and its place among the measures and columns of a task (`sdt_dist/tasks/`).
"""
