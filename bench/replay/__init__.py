"""Recorded turns of agents on an engine, and what a replay says of them."""
