"""The search tree: nodes as records, what their values are, and what is kept of a search."""
