"""Evaluation runs: configuration, plan, runner, result files, summary.

May import: search, models, rewards, metrics, data and below; what is drawn is `sdt_dist.report`.
To add a setting: a field of `EvaluationConfig` with its description, and its check in `plan.py`, before anything loads.
Every number of a report is recomputed from `problems.json` and `samples.jsonl`, which only grow.
"""
