"""The `sdt` command line, connecting and diagnosis."""
