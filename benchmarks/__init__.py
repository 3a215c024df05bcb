"""Measurements: `python -m benchmarks.NAME` writes `benchmarks/records/NAME.json`; tables and plots come from there."""
