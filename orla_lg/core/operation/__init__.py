"""A core in operation: what may be changed and seen while calls wait, and what is given back at its end."""
