"""Lint, engine, audit: what TensorRT wants, what it builds, and what it did with every pair."""
