"""Training stages over one optimiser loop."""
