"""Benchmarks and experiments, a folder each; ``lib`` has what several of them need. They run from the root."""
