"""Speed and memory, each figure a ratio against a plain peer in the same run: `python -m benchmarks [--quick]`."""
