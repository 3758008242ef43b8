"""Backends that serve next-token scores, processes over them, and how a model is loaded by name.

May import: data (scales), protocols and below; never search. torch, transformers, mlx and vllm load with the backend alone.
To add a backend: a `Decoder` under `cached_model.CachedModel`, or a `LogitsModel` of its own, in a folder of its name; its
prefix in the MODEL SPEC; a fixture in `tests/conformance/conftest.py`, whose laws it must pass.
To add a kind of prior: its states (root, is_finished, decode) beside `process.py`, and its card (`card.states_of`).
"""
