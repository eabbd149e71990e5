"""Engines with a prefix tree: the tree, references to it, admission, capacity, eviction."""
