"""Rewards of finished samples, and their parsing."""
