"""The learned mapper on labelled prompts."""
