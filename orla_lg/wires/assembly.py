"""A chat completion built from the chunks of its stream.

Engines number parallel tool calls from 0, from 1, all the same or not at all, and give names, ids and arguments once
or with each delta. What they answer rightly in one piece must come out right here, so numbers, ids and names are
hints about what belongs together. Nothing is sized by a number in an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from orla_lg.wires.merging import joined, kind_of, merged, number
from orla_lg.wires.reading import Garbage, count, list_in, object_in
from orla_lg.wires.tool_calls import ToolCalls
from orla_lg.wires.whole_calls import HeardCalls

_CHOICE_KEYS = frozenset({"delta", "message", "index"})


class Assembly:
    """Builds the chat completion that a non-streamed request would have brought, from its chunks.

    Args:
        heard: Hears the first choice's tool calls.
    """

    def __init__(self, heard: HeardCalls | None = None) -> None:
        self.error: dict[str, Any] | None = None
        self.finished = False
        """Whether a chunk said why the answer ends."""
        self._top: dict[str, Any] = {}
        self._choices: dict[Any, _Choice] = {}
        self._heard = heard

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
                raise Garbage(f"a choice is {kind_of(part)}, expected an object")
            index = number(part.get("index")) or 0
            choice = self._choices.get(index)
            if choice is None:
                choice = self._choices[index] = _Choice(index, self._heard if index == 0 else None)
            choice.add(part)
            self.finished = self.finished or bool(part.get("finish_reason"))
        for key, value in chunk.items():
            if key == "usage":
                value = _counts(value)
            if key != "choices" and value is not None:
                self._top[key] = value

    def message(self) -> dict[str, Any] | None:
        """Return the first choice's message; ``None`` without one."""
        first = min(self._choices, default=None)
        return None if first is None or not self._choices[first].came else self._choices[first].message()

    def completion(self) -> dict[str, Any]:
        """Return the whole; what is not yet there is missing or null, as in a response cut short."""
        choices = [self._choices[index].whole() for index in sorted(self._choices)]
        return {**self._top, "object": "chat.completion", "choices": choices}


class _Choice:
    def __init__(self, index: int, heard: HeardCalls | None) -> None:
        self.came = False
        """Whether a part of a message came, be it an empty one."""
        self._rest: dict[str, Any] = {"index": index}
        self._message: dict[str, Any] = {}
        self._role = "assistant"
        self._calls = ToolCalls(heard)
        self._heard = heard

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
                self._message[key] = merged(self._message.get(key), value)
        self._rest |= {key: value for key, value in part.items() if key not in _CHOICE_KEYS and value is not None}
        if self._heard is not None and (reason := part.get("finish_reason")):
            self._heard.finish(reason)

    def message(self) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self._role, "content": None, **joined(self._message)}
        if calls := self._calls.whole():
            message["tool_calls"] = calls
            message["content"] = message["content"] or None  # streams begin with an empty text, whatever follows
        return message

    def whole(self) -> dict[str, Any]:
        return {"index": 0, "finish_reason": None, **self._rest, "message": self.message()}


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
        elif (counted := count(value)) is not None:
            counts[key] = counted if isinstance(value, str) else value
    return counts
