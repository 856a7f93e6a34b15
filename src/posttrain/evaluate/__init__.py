"""Evaluation: suites of tasks, answers of the base and of every policy, scores, intervals, the alignment tax."""
