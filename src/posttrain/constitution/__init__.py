"""Principles, the prompts that they make, critique and revision, contrast and labels."""
