"""A model server: the queue before a model, and its HTTP face."""
