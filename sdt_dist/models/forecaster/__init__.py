"""The forecaster: a small decoder-only language model over binned, standardised values (Chronos-style).

May import: models, data (scales), protocols and below; its training is `sdt_dist.training.forecaster`.
To change what its tokens mean: `tokenizer.py`, with a new format in `spec.py`, and the weights on board trained anew.
"""
