"""One file per command of `sdt`; heavy imports happen when a command runs.

A command turns options into a configuration of the library and prints what comes back: results on stdout, progress on stderr.
Mistakes are `SdtError`s, which end with one message and exit code 2.
"""
