"""Ray actors of the fleet: thin remote wrappers over plain classes that are tested without Ray."""
