"""Benchmarks: ``python -m benchmarks [CASE…] [--smoke]``."""
