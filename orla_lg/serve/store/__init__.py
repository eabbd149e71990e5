"""What outlives the process: the store, its lease, and what is written behind to it."""
