"""Tools that start while the model still decodes, and prompts that are prefilled while tools run."""
