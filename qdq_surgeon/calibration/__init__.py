"""Feeds (where data comes from), their split, taps (one onnxruntime pass), statistics (mergeable), ranges."""
