"""The shipped placement files. This folder installs as `qdq_surgeon.patterns`."""
