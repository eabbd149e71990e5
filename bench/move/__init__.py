"""A workflow that is moved between two llama.cpp servers: its next call's time to the first token."""
