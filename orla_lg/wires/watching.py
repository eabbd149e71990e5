"""What is heard of an answer while its bytes pass: its tool calls, each as soon as it is whole, and its message.

A watch hears in the terms of chat completions, whatever the wire. It is called in the thread or task that reads the
answer, between two of its pieces: it is quick, and it raises nothing. One that does raise is not called any more for
that attempt.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import Any, NamedTuple, Protocol


class HeardToolCall(NamedTuple):
    """A tool call whose arguments are whole, in an answer that may still go on."""

    position: int
    """Among the answer's calls, from 0, in the order in which they began."""
    id: str | None
    """``None`` where the engine gives none, or none yet."""
    name: str
    arguments: str
    """A JSON object, as the engine wrote it; ``{}`` where it wrote nothing."""


class Late(StrEnum):
    """Why the tool calls of an answer are heard at its end only."""

    PENDING = "pending"
    """Whether the engine's answers are the same when they are streamed is not known yet."""
    DIFFERENT = "different"
    """They are not the same."""
    OFF = "off"
    """``Backend(early_tools=False)``."""
    NOT_ASSEMBLED = "not_assembled"
    """``Backend(assemble=False)``."""
    REQUEST = "request"
    """The request asks for something that a stream may not bring, or its engine refuses to stream with counts."""
    CLIENT = "client"
    """The client asks for the answer in one piece, and for no chat completion by OpenAI's package."""


class AnswerWatch(Protocol):
    """Hears one call's answer; of each attempt from its beginning.

    An attempt without an answer, as one that is refused, is not heard at all. After each ``begins`` comes one
    ``ends``.
    """

    @property
    def wants_calls(self) -> bool:
        """Whether tool calls are of use before the answer ends: it is streamed from the engine for them."""
        ...

    @property
    def wants_message(self) -> bool:
        """Whether the message at the end is of use: each piece of a stream is read for it."""
        ...

    def comes_late(self, why: Late) -> None:
        """Hear why an attempt, which begins now, brings its tool calls at the end only; for one that wants calls."""
        ...

    def begins(self) -> None:
        """Hear that an attempt's answer begins: what an earlier attempt brought does not count any more."""
        ...

    def tool_call(self, call: HeardToolCall) -> None:
        """Hear a tool call, once. An engine may still change it: only the message at the end is certain."""
        ...

    def ends(self, message: Mapping[str, Any] | None) -> None:
        """Hear that the answer ended.

        Args:
            message: The first choice's, as a chat completion has it (``role``, ``content``, ``tool_calls``);
                ``None`` where the answer broke off, was left unread, is too long, or has no such message, and for a
                watch that does not want it.
        """
        ...
