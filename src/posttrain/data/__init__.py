"""Data: from files to packed batches of segments."""
