"""The `sdt` command line, connecting to Ray, diagnosis, jobs, dashboards, files for clusters.

May import: everything. To add a command: a file in `commands/` and a line in `cli.py`; heavy imports happen when it runs.
"""
