"""When a tool call that comes in pieces is whole: its braces balance, the next call begins, or the answer ends."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from orla_lg.wires.watching import HeardToolCall

MOST_HEARD = 128
"""Calls of an answer; in one that begins more, no further call is heard."""

MOST_FINISHES = 4
"""Reasons to end that are heeded; some engines repeat theirs in each chunk."""

_COMPLETE = frozenset({"stop", "tool_calls", "function_call"})
"""Why an answer ends whose last call may have no arguments at all; others cut it short."""

_MARKS = re.compile(r'["\\{}]')


def object_of(arguments: str) -> dict[str, Any] | None:
    """Return the JSON object that *arguments* are; ``None`` where they are none, or not whole."""
    if not arguments.lstrip().startswith("{"):
        return None
    try:
        found = json.loads(arguments)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


class BraceScan:
    """Follows the braces of one JSON object in pieces, without looking at anything twice."""

    __slots__ = ("_depth", "_escaped", "_in_text", "_is_closed")

    def __init__(self) -> None:
        self._depth = 0
        self._in_text = self._is_closed = False
        self._escaped = False
        """Whether the next character of a text stands for itself."""

    def feed(self, piece: str) -> bool:
        """Take in a piece; returns whether the object closes in it."""
        if self._is_closed or not piece:
            return False
        skip = 1 if self._escaped else 0
        for found in _MARKS.finditer(piece, skip):
            at = found.start()
            if at < skip:
                continue
            mark = piece[at]
            if self._in_text:
                if mark == "\\":
                    skip = at + 2
                elif mark == '"':
                    self._in_text = False
            elif mark == '"':
                self._in_text = True
            elif mark == "{":
                self._depth += 1
            elif mark == "}":
                self._depth -= 1
                if self._depth <= 0:
                    self._is_closed = True
                    return self._depth == 0
        self._escaped = skip > len(piece)
        return False


class CallInPieces(Protocol):
    """A call as far as it came (``tool_calls.PartialCall``)."""

    id: str | None
    pieces: list[str]
    scan: BraceScan | None
    is_heard: bool
    is_repeated: bool
    was_looked_at: bool

    @property
    def named(self) -> bool:
        """Whether it has a name."""
        ...

    @property
    def name(self) -> str:
        """Its name so far."""
        ...

    @property
    def arguments(self) -> str:
        """Its arguments so far."""
        ...


class HeardCalls:
    """Tells of each call of an answer once, as soon as its arguments are whole.

    A call is whole when its braces balance, else when the next one begins, else when the answer ends. An empty object
    may stand for arguments that follow, so it counts only when the next call begins, and no arguments at all only at
    the end.

    Args:
        tell: Is called with each.
    """

    def __init__(self, tell: Callable[[HeardToolCall], object]) -> None:
        self.calls: list[Sequence[CallInPieces]] = []
        """All that began, by what their engine sends as one."""
        self._tell = tell
        self._begun = 0
        self._newest: CallInPieces | None = None
        """The one that the last piece belonged to."""
        self._finishes = 0
        self._said = set[tuple[int, str, str]]()

    def take(self, call: CallInPieces, arguments: str) -> None:
        """Note that a call got a piece of its *arguments*, which may be empty."""
        if call.scan is None:
            call.scan = BraceScan()
            self._begun += 1
            before = self._newest
            if before is not None and before.pieces and not (before.was_looked_at or before.is_heard):
                before.was_looked_at = True
                if not self._are_many:
                    self._look(before, before.arguments)
        self._newest = call
        if arguments and call.scan.feed(arguments) and not (call.is_heard or self._are_many):
            whole = "".join(call.pieces)
            if object_of(whole):
                self._hear(call, whole)

    @property
    def _are_many(self) -> bool:
        return self._begun > MOST_HEARD or len(self.calls) > MOST_HEARD

    def finish(self, reason: object) -> None:
        """Note that the answer ends, and why; ``None``: it ended without a reason, or there is nothing after it."""
        self._finishes += 1
        if self._are_many or (reason is not None and self._finishes > MOST_FINISHES):
            return
        for calls in self.calls:
            for call in calls:
                if call.named and not call.is_heard:
                    arguments = call.arguments
                    if arguments.strip():
                        self._look(call, arguments)
                    elif reason in _COMPLETE:
                        self._hear(call, "{}")

    def _look(self, call: CallInPieces, arguments: str) -> None:
        if object_of(arguments) is not None:
            self._hear(call, arguments)

    def _hear(self, call: CallInPieces, arguments: str) -> None:
        name = call.name
        if not name:
            return
        call.is_heard, position = True, 0
        for owner, calls in enumerate(self.calls):
            before = 0
            for each in calls:
                if each is call:
                    if (owner, name, arguments) in self._said:  # what is sent twice is one
                        call.is_repeated = True
                    else:
                        self._said.add((owner, name, arguments))
                        self._tell(HeardToolCall(position + before, call.id, name, arguments))
                    return
                before += (each.named or bool(each.pieces)) and not each.is_repeated
            position += max(before, 1)  # one without a name is a call as well
