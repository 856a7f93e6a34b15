"""posttrain: a pretrained base model in, an aligned assistant and the measured cost of alignment out."""

__version__ = "0.1.0"
