"""Very many calls waiting in the core."""
