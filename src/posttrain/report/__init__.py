"""The report, `show` and `compare`. They read only the artifacts of a run and do not import torch."""
