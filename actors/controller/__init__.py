"""The one supervisor of a fleet: work, health, routes, flows, and what servers agree on.

May import: actors and the library; never Ray. To add a kind of actor: a `Slot` with a kind of its own, whom it joins
(`controller.py`), and what a death of it means for searches under way.
"""
