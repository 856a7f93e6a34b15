"""The report and what `show` and `compare` print: drawn from a run's artifacts alone, without torch."""
