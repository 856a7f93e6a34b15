"""Base models, adapters, attention over packed segments, and log-probabilities of targets."""
