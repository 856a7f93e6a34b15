"""Serving a model: the HTTP server with the APIs of the openai package, and chat in the terminal."""
