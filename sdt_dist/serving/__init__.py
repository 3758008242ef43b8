"""A model server: the queue before a model, and its HTTP face.

May import: models, flow and below; never search or Ray (an actor is a thin wrapper elsewhere). To add what a server can be
asked: a method of `ModelServer`, its route in `http.py`, its client in `models/remote/http_client.py`.
"""
