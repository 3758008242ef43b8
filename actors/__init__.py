"""The fleet: model servers, searchers, store shards, learner, as plain classes; thin Ray wrappers in one place.

May import: the whole library; never tune or cluster. Plain classes know no Ray and are tested without it.
To add an actor: a class here, its wrapper beside the others, its place in `controller/`, its counters in `metrics.py`.
"""
