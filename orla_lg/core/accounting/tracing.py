"""What follows a call from its arrival, in its caller's context: a call is a part of the trace that it is made in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from orla_lg.core.call import Call


class CallTracer(Protocol):
    """Follows calls (``Services.tracer``); their records tell it of their ends. Where there is none, no call pays."""

    def arrived(self, call: Call) -> None:
        """Note that a call arrived, in its caller's thread or task."""
        ...

    def sending(self, call: Call, backend: str | None, attempt: int) -> Mapping[str, str]:
        """Note that an attempt is sent, perhaps once more; returns the headers that tell its engine of the trace."""
        ...
