"""What is certain of the next prompt while its tools still run, so that it can be prefilled meanwhile."""
