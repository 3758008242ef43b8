"""The search tree: nodes as records, masses and soft values, resampling, and a finished search as arrays.

May import: protocols, files, noise, errors. It must not know models, rewards or how a method searches.
To add a quantity of a node: a field of the record in `tree.py`, its backup in a kernel of `mass.py` or `soft.py`, and its
place in `snapshot.py`, so that a saved search goes on as if it had never stopped.
"""
