"""Measures of forecasts and texts, by library code (docs/guides/evaluate.md).

`forecast` scores samples against a truth, `spectrum` compares power spectra, `aggregate` turns per-problem values
into means with bootstrap intervals and paired differences, `text` holds the measures of language samples.
"""
