"""One file per command of `sdt`; heavy imports happen when a command runs."""
