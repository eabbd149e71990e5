"""What follows a call's record: what is summed of it, what becomes known later, and what mappers learn from it."""
