"""The tools that were started early, by root run: begun, handed over once, or dropped."""

from __future__ import annotations


class EarlyStarts:
    """All early starts of one ``Orla``. Any thread may call."""

    def run_ended(self, run: str) -> None:
        """Drop what was started for a root run, and cancel what can be cancelled."""
