"""Turns in a file: each is written when it has ended, and what is there is not measured again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.lib.calls import CallSeen, JobSeen, Turn


class Kept:
    """The turns measured so far with the same settings.

    Raises:
        SystemExit: The file holds turns with other settings, or something else.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.settings = dict(settings)
        """What all turns have in common; those of the file win."""
        self.turns: list[Turn] = []
        if path.exists():
            self._read()

    def _read(self) -> None:
        try:
            said = json.loads(self._path.read_text(encoding="utf-8"))
            settings, rows = said["settings"], said["turns"]
            self.turns = [_turn(row) for row in rows]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{self._path} holds no turns of this benchmark: {error!r}") from error
        changed = [name for name in self.settings if settings.get(name) != self.settings[name]]
        if changed:
            raise SystemExit(
                f"{self._path} was measured with another {', '.join(changed)}: "
                f"{ {name: settings.get(name) for name in changed} }; give another file to --keep, or remove it"
            )
        self.settings = settings

    def has(self, arm: str, seed: int) -> bool:
        return any((turn.arm, turn.seed) == (arm, seed) for turn in self.turns)

    def add(self, turn: Turn) -> None:
        """Keep a turn; the file is whole at every moment."""
        self.turns.append(turn)
        told = {"settings": self.settings, "turns": [asdict(each) for each in self.turns]}
        fresh = self._path.with_name(f"{self._path.name}.new")
        fresh.write_text(json.dumps(told), encoding="utf-8")
        fresh.replace(self._path)


def _turn(row: Mapping[str, Any]) -> Turn:
    calls, jobs = [CallSeen(**call) for call in row["calls"]], [JobSeen(**job) for job in row["jobs"]]
    return Turn(**{**row, "calls": calls, "jobs": jobs})
