"""What TokenMixup costs, measured: `python -m benchmarks`, or `python -m benchmarks.ROW`."""
