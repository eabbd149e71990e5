"""The format of the estimates file: written whole or not at all, and believed in nothing that it says.

What is in it came from a run of ours, from a newer version, from a disk that failed, or from another program. So
every number is checked before it is used: an infinite count of turns is never halved to a small one, and an average
of -1 values divides by zero when it learns the next.
"""

from __future__ import annotations

import errno
import json
import os
import stat
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from orla_lg.core.boundary.plain import shown
from orla_lg.errors import ConfigError

FORMAT, VERSION = "orla-lg estimates", 2

ADDED: Mapping[int, Mapping[str, Any]] = {2: {"final": {}}}
"""By version, what a stage has since then; one of an earlier version begins with it."""

MOST_BYTES = 256 * 2**20
"""A file with all that is ever remembered is smaller."""

MOST_MAPPED = 10_000
"""Of one stage, so many others may have followed, and so many backends may have served it."""

LARGEST = 1e15
"""Seconds, tokens and counts stay far below."""


def text_of(stages: Sequence[Mapping[str, Any]]) -> str:
    """Return stages in the file's format."""
    return json.dumps({"format": FORMAT, "version": VERSION, "stages": stages}) + "\n"


def write_stages(file: Path, stages: Sequence[Mapping[str, Any]]) -> None:
    """Write the file whole or not at all, for its user alone.

    It is made under a name that cannot be foreseen, never through a link, and then given its own.

    Raises:
        ConfigError: It cannot be written.
    """
    staging = ""
    try:
        descriptor, staging = tempfile.mkstemp(prefix=f".{file.name[:100]}.", dir=file.parent)  # O_EXCL, mode 0600
        with os.fdopen(descriptor, "w", encoding="utf-8") as opened:
            opened.write(text_of(stages))
        Path(staging).replace(file)
    except OSError as error:
        if staging:
            Path(staging).unlink(missing_ok=True)
        raise ConfigError(f"estimates cannot be kept in {file}: {error.strerror}") from error


def read_stages(file: Path, most: int) -> list[Stored] | None:
    """Return the stages of a file, *most* of them at most (the newest); ``None`` without a file.

    Raises:
        ConfigError: It does not hold estimates of ours.
        OSError: It cannot be read.
    """
    try:
        mode = file.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # a pipe would be waited for, a device may have no end
            raise OSError(errno.EINVAL, "it is neither a file nor missing")
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return None
    return stages_in(text, file, most)


def stages_in(text: bytes, file: Path, most: int) -> list[Stored]:
    """Return the stages in what a file holds, *most* of them at most (the newest).

    Raises:
        ConfigError: It does not hold estimates of ours.
    """
    if len(text) > MOST_BYTES:
        raise ConfigError(f"{file} does not hold estimates of ours (it is larger than {MOST_BYTES} bytes)")
    try:
        top = json.loads(text)
    except RecursionError:
        raise ConfigError(f"{file} does not hold estimates of ours (it is nested too deep)") from None
    except ValueError as error:
        raise ConfigError(f"{file} does not hold estimates of ours ({error})") from error
    whole = Stored(file, "", top)
    version = whole.number("version")
    if whole.of("format") != FORMAT or version not in range(1, VERSION + 1):
        said = f"{shown(repr(whole.of('format')), 50)}, version {shown(repr(whole.of('version')), 50)}"
        raise ConfigError(f"{file} does not hold estimates of ours (it is {said})")
    stages = whole.of("stages")
    if not isinstance(stages, list):
        whole.wrong("stages", stages, "a list")
    first = max(0, len(stages) - most)
    missing = {name: value for since, names in ADDED.items() if version < since for name, value in names.items()}
    return [
        Stored(file, f"stages[{number}]", {**missing, **each} if isinstance(each, dict) else each)
        for number, each in enumerate(stages[first:], start=first)
    ]


@dataclass(frozen=True, slots=True)
class Stored:
    """An object in the file; what is asked of it is there and as it should be, or a ``ConfigError`` names it."""

    file: Path
    where: str
    fields: Any

    def of(self, name: str) -> Any:
        """Return a field."""
        if not isinstance(self.fields, dict):
            self.wrong("", self.fields, "an object")
        if name not in self.fields:
            raise ConfigError(f"{self.file} does not hold estimates of ours ({self._at(name)} is missing)")
        return self.fields[name]

    def text(self, name: str) -> str:
        """Return a text."""
        value = self.of(name)
        return value if isinstance(value, str) else self.wrong(name, value, "a text")

    def number(self, name: str) -> float:
        """Return a number of 0 or more."""
        return self._number(name, self.of(name))

    def numbers(self, name: str) -> dict[str, float]:
        """Return numbers of 0 or more by name."""
        return {key: self._number(f"{name}.{key}", value) for key, value in self._mapping(name).items()}

    def mean(self, name: str) -> tuple[float, int]:
        """Return an average and of how many."""
        return self._mean(name, self.of(name))

    def means(self, name: str, most: int) -> dict[int, tuple[float, int]]:
        """Return averages by number of visit, 1 to *most*."""
        found = {}
        for key, value in self._mapping(name).items():
            if not (key.isascii() and key.isdigit() and len(key) < 10 and 1 <= int(key) <= most):
                self.wrong(f"{name}.{key}", key, f"a visit, 1 to {most}")
            found[int(key)] = self._mean(f"{name}.{key}", value)
        return found

    def _mapping(self, name: str) -> dict[str, Any]:
        value = self.of(name)
        if not isinstance(value, dict) or len(value) > MOST_MAPPED:
            self.wrong(name, value, f"an object with {MOST_MAPPED} fields at most")
        return value

    def _mean(self, name: str, value: Any) -> tuple[float, int]:
        if not isinstance(value, list) or len(value) != 2:
            self.wrong(name, value, "an average and a count")
        average, seen = self._number(f"{name}[0]", value[0], least=-LARGEST), self._number(f"{name}[1]", value[1])
        if seen != int(seen):
            self.wrong(f"{name}[1]", value[1], "a whole number")
        return average, int(seen)

    def _number(self, name: str, value: Any, least: float = 0.0) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LARGEST:
            self.wrong(name, value, f"a number from {least:g} to {LARGEST:g}")
        return float(value)

    def wrong(self, name: str, value: Any, right: str) -> NoReturn:
        """Say that a field is not what it should be."""
        found = shown(json.dumps(value) if isinstance(value, int | float | str) else type(value).__name__, 50)
        raise ConfigError(f"{self.file} does not hold estimates of ours ({self._at(name)} is {found}, not {right})")

    def _at(self, name: str) -> str:
        return shown(".".join(part for part in (self.where, name) if part) or "all of it", 200)
