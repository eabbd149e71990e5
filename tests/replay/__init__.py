"""Replays, in virtual time."""
