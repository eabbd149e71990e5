"""What the early starts of a tool teach: one whose starts come to nothing, answer after answer, is left out."""

from __future__ import annotations

from collections.abc import Collection

from langchain_core.tools import BaseTool

MOST_IN_VAIN = 3
"""Answers in a row whose starts of a tool came to nothing; then it starts early no more."""


class Streak:
    """The answers in a row whose starts of one tool came to nothing."""

    __slots__ = ("answers", "last", "ran", "starts", "tool")

    def __init__(self, tool: BaseTool) -> None:
        self.tool = tool
        """Held, so that no other gets its id."""
        self.answers = self.starts = 0
        self.last = ""
        """The call in whose answer the newest start was."""
        self.ran = False
        """The graph ran the tool meanwhile, for other calls."""

    def goes_on(self, calls: Collection[str]) -> bool:
        """Count a start for each answer to one of *calls*; returns whether these are enough."""
        for call in calls:
            self.starts += 1
            self.answers += call != self.last
            self.last = call
        return self.answers >= MOST_IN_VAIN
