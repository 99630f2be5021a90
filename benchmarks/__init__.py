"""Benchmarks: what raysweep costs beside the work that cannot be avoided. `python -m benchmarks --help`."""
