"""Ray actors of the fleet: thin remote wrappers over plain classes (none yet; the in-process driver serves)."""
