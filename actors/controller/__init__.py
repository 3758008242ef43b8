"""The one supervisor of a fleet and its parts."""
