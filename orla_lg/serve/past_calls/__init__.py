"""What the server remembers of its calls for those that ask: completions, feedback, and kept requests."""
