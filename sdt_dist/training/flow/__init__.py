"""Training of the flow F from searches."""
