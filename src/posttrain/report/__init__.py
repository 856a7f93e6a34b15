"""The report: reads artifacts only, no torch."""
