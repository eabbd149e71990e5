"""The simulated engine beside the real one."""
