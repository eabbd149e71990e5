"""What follows a call's record: what becomes known of it later, and what mappers learn from it."""
