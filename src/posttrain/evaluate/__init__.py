"""Evaluation: suites of tasks, answers of the base and every policy, scores, intervals, the alignment tax."""
