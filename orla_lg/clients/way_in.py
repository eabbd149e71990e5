"""How clients find out where a request is made: the graph's side says, while a core is open."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, NamedTuple

from orla_lg.clients.sending import CallSite


class WayIn(NamedTuple):
    """What the graph's side knows."""

    model_run: ContextVar[Any]
    """``None`` where no run of a LangChain model is about to make a request."""
    site: Callable[[Mapping[str, Any]], CallSite | None]
    """Returns where a request with this body is made; ``None`` outside wrapped graphs."""


_CLOSED = WayIn(ContextVar("orla_no_model_run", default=None), lambda body: None)

way_in: WayIn = _CLOSED


def open_way_in(known: WayIn) -> None:
    """Let requests find their call site from now on."""
    global way_in
    way_in = known


def close_way_in() -> None:
    """Let all requests pass."""
    global way_in
    way_in = _CLOSED
