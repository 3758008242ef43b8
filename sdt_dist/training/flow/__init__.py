"""Training of the flow F from searches: trajectories, replay, losses, the learner, rounds.

May import: everything up to evaluation. To add a loss: a pure function in `losses.py`, its weight in `options.py`, its line in
`trainer.py`, and a test with tables of exact values that shows what it pins (`tests/property/test_flow_values.py`).
To add a source of contexts: a `ContextSource` in `contexts.py`.
"""
