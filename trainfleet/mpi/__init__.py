"""Data, tensor and pipeline parallelism and ZeRO for NumPy arrays, over any Group: each method on a page."""
