"""The fast paths for CPUs: compiled C, its bindings, and what calls them."""
