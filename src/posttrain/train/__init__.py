"""The training stages, and the optimiser step that they share."""
