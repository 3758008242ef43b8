"""Measures of forecasts and texts, by library code."""
