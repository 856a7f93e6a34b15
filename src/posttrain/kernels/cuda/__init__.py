"""The fast paths for CUDA devices: varlen attention, compiled regions, recorded graphs."""
