"""What the account of a cache costs."""
