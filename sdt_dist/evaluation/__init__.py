"""Evaluation runs: configuration, runner, results, summary, figures and report."""
