"""Costs as ratios measured within one run, each with one command: `python -m benchmarks.NAME`."""
