"""Every fast path, each beside the plain PyTorch that says what it computes."""
