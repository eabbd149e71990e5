"""Who may do what: keys, what their callers may do, and what they may spend."""
