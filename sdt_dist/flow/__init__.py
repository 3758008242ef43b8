"""The learned flow F as searches and model servers use it: what it is, its files, its network.

May import: models, protocols and below; never training. Only `network`, `flow` and `checkpoint` load torch: what a run can
refuse of a flow is in its JSON (`info.py`, `files.py`). To add a head: a module beside `network.py`, named in `spec.py`.
"""
