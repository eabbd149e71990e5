"""Agents that together need more KV cache than the engine has."""
