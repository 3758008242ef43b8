"""Transformers models as backends: shared prompt caches, an own batched decode loop, exact counting."""
