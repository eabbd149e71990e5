"""The watch over an answer of a graph whose prompts are split: around that which starts tools, where there is one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orla_lg.core.inflight import InFlightCall
from orla_lg.core.serving import Serving
from orla_lg.graph.tools.early.starts import EarlyStart
from orla_lg.graph.tools.split.next_prompt import NextPrompts
from orla_lg.wires.watching import AnswerWatch, HeardToolCall, Late


class SplitWatch:
    """Passes on what is heard of a call's answer, and in the end has its next prompt awaited.

    Args:
        next_prompts: Awaits it.
        serving: Serves the call.
        inflight: The call.
        inner: Hears the answer too.
        starts: Returns what *inner* started.
    """

    wants_message = True
    """The answer's message is needed, whatever it brings."""

    def __init__(
        self, next_prompts: NextPrompts, serving: Serving, inflight: InFlightCall, inner: AnswerWatch | None = None,
        starts: Callable[[], Sequence[EarlyStart]] = tuple,
    ) -> None:  # fmt: skip
        self._next_prompts = next_prompts
        self._serving = serving
        self._inflight = inflight
        self._inner = inner
        self._starts = starts
        self.wants_calls = inner is not None and inner.wants_calls
        """Whether tool calls are of use before the answer ends."""

    def comes_late(self, why: Late) -> None:
        """Pass it on."""
        if self._inner is not None:
            self._inner.comes_late(why)

    def begins(self) -> None:
        """Note that an attempt's answer begins."""
        if self._inner is not None:
            self._inner.begins()

    def tool_call(self, call: HeardToolCall) -> None:
        """Pass on a tool call."""
        if self._inner is not None:
            self._inner.tool_call(call)

    def ends(self, message: Mapping[str, Any] | None) -> None:
        """Have the prompt awaited that follows on this answer."""
        if self._inner is not None:
            self._inner.ends(message)
        self._next_prompts.answered(self._serving, self._inflight, message, self._starts())
