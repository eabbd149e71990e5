"""Orla's own APIs, for the clients of the Orla daemons: v1 and v2, under one prefix."""
