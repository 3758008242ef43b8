"""The forecaster: a small decoder-only language model over binned, standardised values (Chronos-style)."""
