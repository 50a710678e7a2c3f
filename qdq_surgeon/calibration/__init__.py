"""Feeds (where data comes from), taps (one onnxruntime pass), statistics (mergeable), ranges (to thresholds)."""
