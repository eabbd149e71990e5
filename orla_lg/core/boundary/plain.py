"""The one rule for text that is not ours (thread ids, stages, tenants, errors) where it leaves the process.

Such text may hold anything that a Python string can: a lone surrogate, which no encoding takes, a control character,
which steers a terminal, a mark that turns the direction of writing, a megabyte. In what people read (the live view,
``explain``, answers of the control socket) each of these is written as its escape, ``\\ud800``, and the length is
bounded. In JSON the same escapes are JSON's own, so that a reader gets back exactly what was written.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any

MOST_CHARS = 1_000
"""Of a text from outside, so much is shown."""

_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters, marks of direction, and halves of surrogate pairs."""

_UNPRINTABLE = "a value that cannot be written"


def shown(value: object, most: int = MOST_CHARS) -> str:
    """Return a value as text that any terminal and any encoding of Unicode takes; what is left out is counted."""
    text = value if isinstance(value, str) else _text_of(value)
    escaped = _UNSAFE.sub(_escape, text[:most])
    if len(text) <= most and len(escaped) <= most:
        return escaped
    return f"{escaped[: most - 1]}…" + (f" ({len(text)} characters)" if most > 100 else "")


def shown_within(value: Any, most: int = MOST_CHARS) -> Any:
    """Return plain data (mappings, sequences, scalars) with every text in it as ``shown`` has it."""
    if isinstance(value, str):
        return shown(value, most)
    if isinstance(value, Mapping):
        return {shown(key, most): shown_within(each, most) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [shown_within(each, most) for each in value]
    return value


def counted(count: int, one: str, several: str = "") -> str:
    """Return a count with its noun: ``1 cache``, ``2 caches``; *several* where an s does not make the plural."""
    return f"{count:,} {one if count == 1 else several or one + 's'}"


def is_path(path: str | os.PathLike[str]) -> bool:
    """Whether a file can have this path, as far as its characters go."""
    try:
        return b"\0" not in os.fsencode(path)
    except UnicodeEncodeError:  # a lone surrogate
        return False


def json_line(fields: Mapping[str, Any], *, indent: int | None = None) -> str:
    """Return an object as JSON; a field that JSON cannot hold is written as text, and the others as they are."""
    try:
        return _json(fields, indent)
    except (TypeError, ValueError, RecursionError):
        return _json({shown(name): _writable(value) for name, value in fields.items()}, indent)


def _json(value: Any, indent: int | None) -> str:
    return _UNSAFE.sub(_escape_in_json, json.dumps(value, ensure_ascii=False, default=_text_of, indent=indent))


def _writable(value: Any) -> Any:
    try:
        json.dumps(value, default=_text_of)
    except (TypeError, ValueError, RecursionError):
        return shown(value)
    return value


def _text_of(value: object) -> str:
    try:
        return str(value)
    except Exception as error:  # noqa: BLE001 - the class of a value from outside is its user's code
        return f"{_UNPRINTABLE} ({type(value).__name__}: {type(error).__name__})"


def _escape(found: re.Match[str]) -> str:
    return f"\\u{ord(found[0]):04x}"


def _escape_in_json(found: re.Match[str]) -> str:
    return found[0] if found[0] == "\n" else f"\\u{ord(found[0]):04x}"
