"""Training of forecasters."""
