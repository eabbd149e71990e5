"""The tool calls of a message, from the pieces in which engines send them.

Engines number parallel tool calls from 0, from 1, all the same or not at all, and give names, ids and arguments once
or with each delta, so numbers, ids and names are hints about what belongs together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from orla_lg.wires.merging import joined, kind_of, merged, number
from orla_lg.wires.reading import Garbage, object_in
from orla_lg.wires.whole_calls import BraceScan, HeardCalls, object_of

_CALL_KEYS = frozenset({"id", "type", "index", "function", "name", "arguments"})
MANY_LOOKS = 64
"""So often is asked whether the arguments of one call are whole where nothing else tells calls apart."""


class ToolCalls:
    """The tool calls of one message, from their deltas.

    A delta belongs to the call with its index and its id, else to the newest call with its index, else to the one
    with its id, else to the newest of all; one that brings a name, be it an empty one, and an id which that call does
    not have begins a call of its own.

    Args:
        heard: Hears each call as soon as it is whole.
    """

    def __init__(self, heard: HeardCalls | None = None) -> None:
        self._heard = heard
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
            raise Garbage(f"a tool call is {kind_of(delta)}, expected an object")
        function, custom = object_in(delta, "function"), object_in(delta, "custom")
        index, given = number(delta.get("index")), delta.get("id")
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
        call.add(delta, function, named if named is not None or given != "" else "", self._heard)

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
        call = _ToolCall()
        self._calls.append(call)
        if self._heard is not None:
            self._heard.calls.append(call.groups)
        return call

    def whole(self) -> list[dict[str, Any]]:
        """Return the calls, in the order in which they began."""
        return [whole for call in self._calls for whole in call.wholes()]


class _ToolCall:
    """What one index or id brought: a call, or several where an engine numbers all alike and names none."""

    def __init__(self) -> None:
        self.id: str | None = None
        self.groups: list[PartialCall] = []
        """Of the pieces that came, those of one call each."""
        self._type: str | None = None
        self._rest: dict[str, Any] = {}
        self._function: dict[str, Any] = {}
        self._first_name: str | None = None
        """The name in its first piece."""
        self._arguments: list[str] = []
        """The pieces of all its arguments."""
        self._looks = MANY_LOOKS

    def add(
        self, delta: Mapping[str, Any], function: Mapping[str, Any], id: str | None, heard: HeardCalls | None
    ) -> None:
        if isinstance(kind := delta.get("type"), str) and kind:
            self._type = kind
        name, arguments = _text(function.get("name")), _text(function.get("arguments"))
        if name or arguments or (id and not self.id):
            group = self._group_for(name, arguments, id)
            group.add(name, arguments, id)
            if arguments:
                self._arguments.append(arguments)
            if heard is not None:
                heard.take(group, arguments)
        self.id = self.id or id
        for into, source in ((self._rest, delta), (self._function, function)):
            for key, value in source.items():
                if key not in _CALL_KEYS and value is not None:
                    into[key] = merged(into.get(key), value)

    def _group_for(self, name: str, arguments: str, id: str | None) -> PartialCall:
        """Return the call that a piece belongs to: the next one begins with a name, or an id, after whole arguments.

        Either text may be empty.
        """
        if not self.groups:
            self._first_name = name
            self.groups.append(PartialCall())
        before, begins = self.groups[-1], False
        if name and before.pieces:
            begins = name != before.name
            if not begins and self._looks and object_of(arguments) is not None:
                self._looks -= 1
                begins = before.is_whole
        elif id and before.pieces and not before.id:
            begins = before.is_whole
        if begins:
            self.groups.append(PartialCall())
        return self.groups[-1]

    def repeats(self, delta: Mapping[str, Any], function: Mapping[str, Any]) -> bool:
        """Whether *delta*, which has neither an index nor an id, names the call again and goes on with it."""
        names_it = delta.get("id") == "" or self._first_name == function.get("name")
        return names_it and not self._is_whole

    @property
    def _is_whole(self) -> bool:
        """Whether its arguments are whole so far; cheap where they plainly go on."""
        last = self._arguments[-1] if self._arguments else ""
        return last.rstrip().endswith("}") and object_of("".join(self._arguments)) is not None

    def wholes(self) -> Iterator[dict[str, Any]]:
        rest, function = joined(self._rest), joined(self._function)
        groups = self.groups or [PartialCall()]
        is_custom = "custom" in rest and not any(group.named or group.pieces for group in groups)
        late = groups[-1].id if len(groups) > 1 and not (groups[-1].named or groups[-1].pieces) else None
        if late is not None:  # an id that comes last
            groups = groups[:-1]
        calls: dict[tuple[str, str], str | None] = {}  # what is sent twice is one
        for group in groups:
            said, id = (group.name, group.arguments), group.id
            if late is not None and group is groups[-1]:
                id = id or late
            calls[said] = calls.get(said) or id
        for (name, arguments), id in calls.items():
            whole = {"type": self._type or "function", **rest}
            if id is not None:
                whole = {"id": id, **whole}
            if not is_custom:
                whole["function"] = {**function, "name": name, "arguments": arguments}
            yield whole


class PartialCall:
    """One call as far as it came."""

    __slots__ = ("_distinct", "_names", "id", "is_heard", "is_repeated", "pieces", "scan", "was_looked_at")

    def __init__(self) -> None:
        self.id: str | None = None
        self.pieces: list[str] = []
        """Of its arguments."""
        self.scan: BraceScan | None = None
        """Of its arguments, where they are heard."""
        self.is_heard = False
        """Whether it was heard whole."""
        self.is_repeated = False
        """Whether the same was heard before, so that it is none of its own."""
        self.was_looked_at = False
        """Whether it was looked at when the next one began."""
        self._names: list[str] = []
        self._distinct: set[str] = set()

    def add(self, name: str, arguments: str, id: str | None) -> None:
        """Take in a piece; either text may be empty."""
        if not self.id and id is not None:
            self.id = id
        if name:
            self._names.append(name)
            self._distinct.add(name)
        if arguments:
            self.pieces.append(arguments)

    @property
    def named(self) -> bool:
        """Whether it has a name."""
        return bool(self._names)

    @property
    def name(self) -> str:
        """Its name from its pieces, or where each delta repeats it."""
        return self._names[0] if len(self._distinct) == 1 else "".join(self._names)

    @property
    def arguments(self) -> str:
        """Its arguments from their pieces, or the last of them where it repeats the whole."""
        whole = "".join(self.pieces)
        if len(self.pieces) > 1 and object_of(whole) is None and object_of(self.pieces[-1]) is not None:
            return self.pieces[-1]
        return whole

    @property
    def is_whole(self) -> bool:
        """Whether its arguments are, so far."""
        return object_of("".join(self.pieces)) is not None


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    return json.dumps(value) if isinstance(value, Mapping | list) else ""
