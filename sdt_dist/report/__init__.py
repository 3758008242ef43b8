"""Reports of runs as blocks, rendered as one HTML page and as Markdown."""
