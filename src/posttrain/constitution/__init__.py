"""Constitutions: principles and the prompts made from them."""
