"""Send branches with a prefix in common."""
