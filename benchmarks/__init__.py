"""Measurements of speed: ratios within one process, each run by `python -m benchmarks.NAME`."""
