"""Which backends a call may be mapped to: those that are known by now, and those that can do what it asks."""
