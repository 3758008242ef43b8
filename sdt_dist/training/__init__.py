"""Training of what searches use: the flow F, and forecasters."""
