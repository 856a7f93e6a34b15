"""Generation: one engine for samples, chat and evaluation."""
