"""Soft-value evidence that searches share."""
