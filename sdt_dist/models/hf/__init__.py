"""The backend of Transformers: Llama on the CPU by hand, any other causal model through its own cache.

May import: models, protocols and below, torch, transformers. To add an architecture that the general decoder serves too
slowly: a `Decoder` beside `llama.py`, chosen in `model.py`, held to the conformance suite.
"""
