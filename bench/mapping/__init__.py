"""Stage mapping on real engines, and what a decision costs."""
