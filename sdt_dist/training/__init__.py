"""Training of what searches use: the flow F in `flow/`, forecasters in `forecaster/`.

May import: everything up to evaluation; nothing below imports it. A training is resumable exactly and repeatable from its seed.
"""
