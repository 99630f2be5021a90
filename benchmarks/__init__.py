"""Benchmarks: the overhead of raysweep over the necessary work. See `python -m benchmarks --help`."""
