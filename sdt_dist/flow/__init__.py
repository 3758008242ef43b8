"""The learned flow network F."""
