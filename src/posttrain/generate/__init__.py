"""Generation: one engine for rollouts, evaluation, chat and serving."""
