"""Datasets and the problems cut from them."""
