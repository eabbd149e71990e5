"""vLLM: a block pool with prefix caching."""
