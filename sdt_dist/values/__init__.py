"""Soft-value evidence that searches share: finished walks and nothing derived from them.

See docs/concepts/exactness.md#shared-evidence.
"""
