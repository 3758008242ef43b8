"""Soft-value evidence that searches share: finished walks and nothing derived from them (SPEC section 4.1)."""
