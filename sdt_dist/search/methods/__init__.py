"""One file per method and one registry."""
