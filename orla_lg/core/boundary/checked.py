"""Values as users give them, checked where they come in: a wrong one is a ``ConfigError`` that names its place.

Each check takes ``where``, the place and name that a message begins with: ``backend 'light': capacity``.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import SupportsFloat, SupportsIndex

from orla_lg.errors import NAME_CHARS, ConfigError, shown

LIKE_A_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
"""A scheme of two letters or more, which no drive of Windows has."""


def dotted(*parts: object) -> str:
    """Return a key with the tables that it stands in: ``backends.light.url``."""
    return ".".join(each if isinstance(each, str) and each.isprintable() and len(each) < NAME_CHARS else shown(each)
                    for each in parts)  # fmt: skip


def text(where: str, value: object, *, empty: bool = False) -> None:
    """Refuse what is no text, or holds characters that neither JSON in UTF-8 nor a log line can carry."""
    if not isinstance(value, str) or not (value or empty):
        raise ConfigError(f"{where} must be {'text' if empty else 'a text that is not empty'}, got {shown(value)}")
    if fault := _unprintable(value):
        raise ConfigError(f"{where} must not hold {fault}, got {shown(value)}")


def texts(where: str, value: object) -> tuple[str, ...]:
    """Return a list of names as a tuple; refuses what is none, a text alone among them."""
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        raise ConfigError(f"{where} must be a list of names, got {shown(value)}")
    for each in value:
        text(f"{where}: each of them", each)
    return tuple(value)


def _unprintable(value: str) -> str | None:
    if any(character < " " or character == "\x7f" for character in value):
        return "control characters"
    try:
        value.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair"
    return None


def whole(where: str, value: object, *, least: int = 0, most: int | None = None) -> None:
    """Refuse what is no whole number of at least *least* and at most *most*."""
    if isinstance(value, bool) or not isinstance(value, SupportsIndex):
        raise ConfigError(f"{where} must be a whole number, got {shown(value)}")
    number = value.__index__()
    if number < least:
        bound = f"must be at least {least}" if least else "must not be negative"
        raise ConfigError(f"{where} {bound}, got {shown(value)}")
    if most is not None and number > most:
        raise ConfigError(f"{where} must be at most {most}, got {shown(value)}")


def is_number(value: object) -> bool:
    """Whether *value* is a finite number; a truth value is none."""
    if isinstance(value, bool | str) or not isinstance(value, SupportsFloat):
        return False
    try:
        return math.isfinite(float(value))
    except (ValueError, OverflowError, TypeError):  # a whole number beyond floats, an array of several
        return False


def number(where: str, value: object, *, least: float = -math.inf, above: float = -math.inf) -> float:
    """Return *value* as a float; refuses what is no finite number, or below *least*, or not above *above*."""
    if not is_number(value):
        raise ConfigError(f"{where} must be a number, got {shown(value)}")
    assert isinstance(value, SupportsFloat)
    given = float(value)
    if given < least:
        bound = f"must be at least {least:g}" if least else "must not be negative"
        raise ConfigError(f"{where} {bound}, got {shown(value)}")
    if given <= above:
        bound = f"must be above {above:g}" if above else "must be positive"
        raise ConfigError(f"{where} {bound}, got {shown(value)}")
    return given


def flag(where: str, value: object) -> None:
    """Refuse what is no truth value."""
    if not isinstance(value, bool):
        raise ConfigError(f"{where} must be true or false, got {shown(value)}")


def choice(where: str, value: object, allowed: Sequence[str]) -> None:
    """Refuse what is none of the *allowed* words."""
    if not isinstance(value, str) or value not in allowed:
        raise ConfigError(f"{where} must be {' or '.join(map(repr, allowed))}, got {shown(value)}")


def path(where: str, value: object) -> Path:
    """Return the path that *value* names, ``~`` followed; refuses what no file system can hold."""
    named = os.fspath(value) if isinstance(value, os.PathLike) else value
    if not isinstance(named, str) or not named:
        raise ConfigError(f"{where} must be the path of a file, got {shown(value)}")
    try:
        if "\0" in named:
            raise ValueError("no path holds NUL")
        if "://" in named or LIKE_A_URL.match(named):
            raise ValueError("it is a URL")
        os.fsencode(named)
        made = Path(named).expanduser()
        with contextlib.suppress(
            FileNotFoundError, NotADirectoryError, PermissionError
        ):  # reported where it is opened
            made.stat()
    except (OSError, RuntimeError, ValueError) as error:  # too long; ``~user`` of no user; half of a surrogate pair
        fault = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"{where}: {shown(named)} is no path of a file: {fault}") from error
    return made
