"""Benchmarks: each prints its figures, a ratio against a named peer measured in the same run, and JSON last."""
