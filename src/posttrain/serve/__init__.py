"""Serving: talking to a model in the terminal."""
