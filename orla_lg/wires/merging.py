"""What two pieces of a streamed message say together: texts and lists go on, objects are merged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_IDENTITY = frozenset({"id", "type", "index", "format", "role", "object", "name"})
"""Keys whose newest value counts: they are not pieces of a text."""


class Pieces(list[str]):
    """A text's pieces, joined once."""


def merged(old: Any, new: Any) -> Any:
    """Return what two deltas say of one key together: texts and lists go on, objects are merged."""
    if isinstance(new, str):
        if isinstance(old, Pieces):
            old.append(new)
            return old
        return [*old, {"type": "text", "text": new}] if isinstance(old, list) and old else Pieces([new])
    if isinstance(new, list):
        if isinstance(old, Pieces):
            text = "".join(old)
            old = [{"type": "text", "text": text}] if text else []
        return _lists_merged(old if isinstance(old, list) else [], new)
    if isinstance(new, Mapping):
        return _objects_merged(old if isinstance(old, dict) else {}, new)
    return new


def _objects_merged(old: dict[str, Any], new: Mapping[str, Any]) -> dict[str, Any]:
    for key, value in new.items():
        if value is None:
            old.setdefault(key, None)
        elif key in _IDENTITY:
            old[key] = value if value != "" else old.get(key, "")
        else:
            old[key] = merged(old.get(key), value)
    return old


def _lists_merged(old: list[Any], new: list[Any]) -> list[Any]:
    """Append, except that entries with an index go on with the newest that has the same."""
    for entry in new:
        index = number(entry.get("index")) if isinstance(entry, Mapping) else None
        before = (
            next((each for each in reversed(old) if _goes_on(each, entry, index)), None)
            if index is not None
            else None
        )
        if before is not None:
            _objects_merged(before, entry)
        else:
            old.append(merged(None, entry) if isinstance(entry, Mapping) else entry)
    return old


def _goes_on(before: Any, entry: Mapping[str, Any], index: int) -> bool:
    if not isinstance(before, dict) or number(before.get("index")) != index:
        return False
    return all(not entry.get(key) or not before.get(key) or entry[key] == before[key] for key in ("id", "type"))


def joined(value: Any) -> Any:
    """Return a value with the pieces of its texts joined."""
    if isinstance(value, Pieces):
        return "".join(value)
    if isinstance(value, dict):
        return {key: joined(each) for key, each in value.items()}
    return [joined(each) for each in value] if isinstance(value, list) else value


def number(value: Any) -> int | None:
    """Return the number of a choice or a call; ``None`` for what is none."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def kind_of(value: Any) -> str:
    """Return what a JSON value is, for an error."""
    return "null" if value is None else type(value).__name__
