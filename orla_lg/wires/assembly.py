"""A chat completion built from the chunks of its stream.

Engines number parallel tool calls from 0, from 1, all the same or not at all, and give names, ids and arguments once
or with each delta. What they answer rightly in one piece must come out right here, so numbers, ids and names are
hints about what belongs together. Nothing is sized by a number in an answer.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from orla_lg.wires.reading import Garbage, count, list_in, object_in

_IDENTITY = frozenset({"id", "type", "index", "format", "role", "object", "name"})
"""Keys whose newest value counts: they are not pieces of a text."""


_CHOICE_KEYS = frozenset({"delta", "message", "index"})
_CALL_KEYS = frozenset({"id", "type", "index", "function", "name", "arguments"})
MANY_LOOKS = 64
"""So often is asked whether the arguments of one call are whole where nothing else tells calls apart."""


class _Text(list[str]):
    """A text's pieces, joined once."""


class Assembly:
    """Builds the chat completion that a non-streamed request would have brought, from its chunks."""

    def __init__(self) -> None:
        self.error: dict[str, Any] | None = None
        self.finished = False
        """Whether a chunk said why the answer ends."""
        self._top: dict[str, Any] = {}
        self._choices: dict[Any, _Choice] = {}

    @property
    def empty(self) -> bool:
        """Whether nothing came that belongs to an answer."""
        return not (self.error or any(choice.came for choice in self._choices.values()))

    @property
    def counted(self) -> bool:
        """Whether token counts came."""
        return bool(self._top.get("usage"))

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take in one chunk.

        Raises:
            Garbage: It is none.
        """
        if chunk.get("error"):
            self.error = dict(chunk)
            return
        for part in list_in(chunk, "choices"):
            if not isinstance(part, Mapping):
                raise Garbage(f"a choice is {_kind(part)}, expected an object")
            index = _number(part.get("index")) or 0
            choice = self._choices.get(index) or self._choices.setdefault(index, _Choice(index))
            choice.add(part)
            self.finished = self.finished or bool(part.get("finish_reason"))
        for key, value in chunk.items():
            if key == "usage":
                value = _counts(value)
            if key != "choices" and value is not None:
                self._top[key] = value

    def completion(self) -> dict[str, Any]:
        """Return the whole; what is not yet there is missing or null, as in a response cut short."""
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return {**self._top, "object": "chat.completion", "choices": choices}


class _Choice:
    def __init__(self, index: int) -> None:
        self.came = False
        """Whether a part of a message came, be it an empty one."""
        self._rest: dict[str, Any] = {"index": index}
        self._message: dict[str, Any] = {}
        self._role = "assistant"
        self._calls = ToolCalls()

    def add(self, part: Mapping[str, Any]) -> None:
        delta = object_in(part, "delta")
        if not (delta or self._message):
            delta = object_in(part, "message")  # the whole at once
        self.came = self.came or any(part.get(key) is not None for key in ("delta", "message"))
        for key, value in delta.items():
            if key == "tool_calls":
                for call in list_in(delta, key):
                    self._calls.add(call)
            elif key == "role":
                self._role = value or self._role
            elif value is not None:
                self._message[key] = _merged(self._message.get(key), value)
        self._rest |= {key: value for key, value in part.items() if key not in _CHOICE_KEYS and value is not None}

    def whole(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self._role, "content": None, **_joined(self._message)}
        if calls := self._calls.whole():
            message["tool_calls"] = calls
        return {"index": 0, "finish_reason": None, **self._rest, "message": message}


class ToolCalls:
    """The tool calls of one message, from their deltas.

    A delta belongs to the call with its index and its id, else to the newest call with its index, else to the one
    with its id, else to the newest of all; one that brings a name, be it an empty one, and an id which that call does
    not have begins a call of its own.
    """

    def __init__(self) -> None:
        self._calls: list[_ToolCall] = []
        self._by_index: dict[int, _ToolCall] = {}
        self._by_id: dict[str, _ToolCall] = {}
        self._by_both: dict[tuple[int, str], _ToolCall] = {}

    def add(self, delta: Any) -> None:
        """Take in one entry of a delta's ``tool_calls``.

        Raises:
            Garbage: It is no object, or its function is none.
        """
        if not isinstance(delta, Mapping):
            raise Garbage(f"a tool call is {_kind(delta)}, expected an object")
        function, custom = object_in(delta, "function"), object_in(delta, "custom")
        index, given = _number(delta.get("index")), delta.get("id")
        named = str(given) if given and isinstance(given, str | int) else None
        has_name = bool(function.get("name") or custom.get("name"))
        if not (has_name or named or function.get("arguments") or custom) and index not in self._by_index:
            return  # nothing yet
        begins = function.get("name") is not None or custom.get("name") is not None  # calls that go on may have ""
        if has_name and index is None and named is None and self._calls and self._calls[-1].repeats(delta, function):
            has_name = False
        call = self._call_for(index, named, has_name=has_name, begins=begins)
        if index is not None:
            self._by_index[index] = call
        if named is not None:
            self._by_id.setdefault(named, call)
            if index is not None:
                self._by_both.setdefault((index, named), call)
        call.add(delta, function, named if named is not None or given != "" else "")

    def _call_for(self, index: int | None, named: str | None, *, has_name: bool, begins: bool) -> _ToolCall:
        known = None if index is None else self._by_index.get(index)
        if known is not None:
            if index is None or named is None or not known.id or named == known.id:
                return known
            # Some engines draw a new id for each delta: a call that goes on brings no name.
            return self._by_both.get((index, named)) or (self._new() if begins else known)
        if named is not None and (index is None or not begins) and named in self._by_id:
            return self._by_id[named]
        if not self._calls or named is not None or (has_name and (index is not None or self._calls[-1].id)):
            return self._new()
        return self._calls[-1]

    def _new(self) -> _ToolCall:
        self._calls.append(_ToolCall())
        return self._calls[-1]

    def whole(self) -> list[dict[str, Any]]:
        """Return the calls, in the order in which they began."""
        return [whole for call in self._calls for whole in call.wholes()]


class _ToolCall:
    """What one index or id brought: a call, or several where an engine numbers all alike and names none."""

    def __init__(self) -> None:
        self.id: str | None = None
        self._type: str | None = None
        self._rest: dict[str, Any] = {}
        self._function: dict[str, Any] = {}
        self._pieces: list[_Piece] = []

    def add(self, delta: Mapping[str, Any], function: Mapping[str, Any], id: str | None) -> None:
        if isinstance(kind := delta.get("type"), str) and kind:
            self._type = kind
        name, arguments = _text(function.get("name")), _text(function.get("arguments"))
        if name or arguments or (id and not self.id):
            self._pieces.append(_Piece(name, arguments, id))
        self.id = self.id or id
        for into, source in ((self._rest, delta), (self._function, function)):
            for key, value in source.items():
                if key not in _CALL_KEYS and value is not None:
                    into[key] = _merged(into.get(key), value)

    def repeats(self, delta: Mapping[str, Any], function: Mapping[str, Any]) -> bool:
        """Whether *delta*, which has neither an index nor an id, names the call again and goes on with it."""
        names_it = delta.get("id") == "" or any(piece.name == function.get("name") for piece in self._pieces[:1])
        return names_it and not self._is_whole

    @property
    def _is_whole(self) -> bool:
        """Whether its arguments are whole so far; cheap where they plainly go on."""
        last = next((piece.arguments for piece in reversed(self._pieces) if piece.arguments), "")
        return last.rstrip().endswith("}") and _is_whole("".join(piece.arguments for piece in self._pieces))

    def wholes(self) -> Iterator[dict[str, Any]]:
        rest, function = _joined(self._rest), _joined(self._function)
        is_custom = "custom" in rest and not any(piece.name or piece.arguments for piece in self._pieces)
        calls: dict[tuple[str, str], str | None] = {}  # what is sent twice is one
        for group in self._groups():
            said = group.name, group.arguments
            calls[said] = calls.get(said) or group.id
        for (name, arguments), id in calls.items():
            whole = {"type": self._type or "function", **rest}
            if id is not None:
                whole = {"id": id, **whole}
            if not is_custom:
                whole["function"] = {**function, "name": name, "arguments": arguments}
            yield whole

    def _groups(self) -> list[_Group]:
        """Return each call's pieces: the next one begins with a name, or an id, after whole arguments."""
        groups = [_Group()]
        looks = MANY_LOOKS
        for piece in self._pieces:
            before, begins = groups[-1], False
            if piece.name and before.pieces:
                begins = piece.name != before.name
                if not begins and looks and _is_whole(piece.arguments):
                    looks -= 1
                    begins = before.is_whole
            elif piece.id and before.pieces and not before.id:
                begins = before.is_whole
            if begins:
                groups.append(_Group())
            groups[-1].add(piece)
        if len(groups) > 1 and not (groups[-1].name or groups[-1].pieces):
            late = groups.pop()  # an id that comes last
            groups[-1].id = groups[-1].id or late.id
        return groups


class _Piece(NamedTuple):
    """What a delta brings of a call; either text may be empty."""

    name: str
    arguments: str
    id: str | None


class _Group:
    """The pieces of one call."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.pieces: list[str] = []
        """Of its arguments."""
        self._names: list[str] = []
        self._distinct: set[str] = set()

    def add(self, piece: _Piece) -> None:
        if not self.id and piece.id is not None:
            self.id = piece.id
        if piece.name:
            self._names.append(piece.name)
            self._distinct.add(piece.name)
        if piece.arguments:
            self.pieces.append(piece.arguments)

    @property
    def name(self) -> str:
        """Its name from its pieces, or where each delta repeats it."""
        return self._names[0] if len(self._distinct) == 1 else "".join(self._names)

    @property
    def arguments(self) -> str:
        """Its arguments from their pieces, or the last of them where it repeats the whole."""
        whole = "".join(self.pieces)
        if len(self.pieces) > 1 and not _is_whole(whole) and _is_whole(self.pieces[-1]):
            return self.pieces[-1]
        return whole

    @property
    def is_whole(self) -> bool:
        """Whether its arguments are, so far."""
        return _is_whole("".join(self.pieces))


def _is_whole(arguments: str) -> bool:
    if not arguments.lstrip().startswith("{"):
        return False
    try:
        return isinstance(json.loads(arguments), dict)
    except (ValueError, RecursionError):
        return False


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, Mapping | list) else ""


def _number(value: Any) -> int | None:
    """Return the number of a choice or a call; ``None`` for what is none."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20:
        return int(value)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _merged(old: Any, new: Any) -> Any:
    """Return what two deltas say of one key together: texts and lists go on, objects are merged."""
    if isinstance(new, str):
        if isinstance(old, _Text):
            old.append(new)
            return old
        return [*old, {"type": "text", "text": new}] if isinstance(old, list) and old else _Text([new])
    if isinstance(new, list):
        if isinstance(old, _Text):
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
            old[key] = _merged(old.get(key), value)
    return old


def _lists_merged(old: list[Any], new: list[Any]) -> list[Any]:
    """Append, except that entries with an index go on with the newest that has the same."""
    for entry in new:
        index = _number(entry.get("index")) if isinstance(entry, Mapping) else None
        before = (
            next((each for each in reversed(old) if _goes_on(each, entry, index)), None)
            if index is not None
            else None
        )
        if before is not None:
            _objects_merged(before, entry)
        else:
            old.append(_merged(None, entry) if isinstance(entry, Mapping) else entry)
    return old


def _goes_on(before: Any, entry: Mapping[str, Any], index: int) -> bool:
    if not isinstance(before, dict) or _number(before.get("index")) != index:
        return False
    return all(not entry.get(key) or not before.get(key) or entry[key] == before[key] for key in ("id", "type"))


def _counts(usage: Any) -> dict[str, Any] | None:
    """Return a ``usage`` object without counts that are none: what reads the answer calculates with them."""
    if not isinstance(usage, Mapping):
        return None
    counts: dict[str, Any] = {}
    for key, value in usage.items():
        if key.endswith("_details"):
            counts[key] = _counts(value)
        elif not key.endswith("_tokens"):
            counts[key] = value
        elif (number := count(value)) is not None:
            counts[key] = number if isinstance(value, str) else value
    return counts


def _joined(value: Any) -> Any:
    if isinstance(value, _Text):
        return "".join(value)
    if isinstance(value, dict):
        return {key: _joined(each) for key, each in value.items()}
    return [_joined(each) for each in value] if isinstance(value, list) else value


def _kind(value: Any) -> str:
    return "null" if value is None else type(value).__name__
