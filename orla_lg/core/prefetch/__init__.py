"""Prompts that are prefilled before their calls come, when the engine has room."""
