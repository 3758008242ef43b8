"""Backends that serve next-token scores, and how a model is loaded by name."""
