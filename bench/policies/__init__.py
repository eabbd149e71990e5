"""Scheduling policies in virtual time."""
