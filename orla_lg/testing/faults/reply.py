"""What may be done to a request."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from email.utils import formatdate
from enum import StrEnum
from types import MappingProxyType


class Fault(StrEnum):
    """One way to fail."""

    SLOW_FIRST_TOKEN = "slow_first_token"
    """Works, but the first byte comes ``slow_s`` seconds late."""
    SLOW_TOKENS = "slow_tokens"
    """Works, but each piece of a stream comes ``slow_s`` seconds late."""
    HANG = "hang"
    """Takes the request and never answers."""
    DEAD_BEFORE_HEADERS = "dead_before_headers"
    """Closes the connection instead of an answer."""
    RESET = "reset"
    """Resets the connection instead of an answer, as a killed process does."""
    DEAD_IN_PREFILL = "dead_in_prefill"
    """Sends the head of the answer, then resets the connection."""
    DEAD_MID_STREAM = "cut"
    """Resets the connection in the middle of the answer."""
    RESTART = "restart"
    """Resets every connection and comes back at once, with an empty cache."""
    NO_DONE = "no_done"
    """A stream that ends politely, but without its end: no reason, no usage, no ``[DONE]``."""
    ERROR_EVENT = "error_event"
    """A stream that turns into an error after its first pieces."""
    GARBAGE = "garbage"
    """What says that it is JSON, and is not."""
    HTML_PAGE = "html_page"
    """A web page, with status 200: a proxy's, or another service on that port."""
    BINARY = "binary"
    """Bytes that are no text."""
    TRUNCATED_JSON = "truncated_json"
    """JSON, or an event, cut in the middle, on a connection that ends politely."""
    WRONG_TYPE = "wrong_type"
    """The right answer, labelled as plain text."""
    NO_USAGE = "no_usage"
    """Answers without token counts."""
    CACHED_ABOVE_PROMPT = "cached_above_prompt"
    """Counts more cached tokens than the prompt has."""
    NEGATIVE_TOKENS = "negative_tokens"
    """Counts fewer tokens than none."""
    BUSY = "busy"
    """429 with ``Retry-After`` in seconds."""
    BUSY_UNTIL = "busy_until"
    """503 with ``Retry-After`` as a date."""
    OVERLOADED = "overloaded"
    """503, saying nothing more."""
    BROKEN = "broken"
    """500."""
    UNAUTHORIZED = "unauthorized"
    """401."""
    MODEL_GONE = "model_gone"
    """404, as if the model were not served any more."""


class Gate:
    """Holds a reply back until the test opens it."""

    def __init__(self) -> None:
        self._opened: Future[None] = Future()

    def open(self) -> None:
        """Let the reply go on. Idempotent."""
        with contextlib.suppress(Exception):
            self._opened.set_result(None)

    async def passed(self) -> None:
        """Wait until it is open."""
        await asyncio.shield(asyncio.wrap_future(self._opened))


@dataclass(frozen=True)
class Reply:
    """How to treat one request; the default is a plain success."""

    text: str | None = None
    """The answer; ``None`` derives it from the messages."""
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()
    before_s: float = 0.0
    """Seconds before the first byte."""
    token_s: float = 0.0
    """Seconds before every chunk of a stream."""
    gate: Gate | None = None
    """Waited for before the first byte."""
    mid_gate: Gate | None = None
    """Waited for after the first content chunk of a stream."""
    fault: Fault | str | None = None
    """What goes wrong; a ``Fault`` or its value."""
    ignore_stream: bool = False
    """Answers whole, streamed or not."""

    def __post_init__(self) -> None:
        if self.fault is not None:
            object.__setattr__(self, "fault", Fault(self.fault))


OK = Reply()

STATUS: Mapping[Fault, int] = MappingProxyType(
    {
        Fault.BUSY: 429,
        Fault.BUSY_UNTIL: 503,
        Fault.OVERLOADED: 503,
        Fault.BROKEN: 500,
        Fault.UNAUTHORIZED: 401,
        Fault.MODEL_GONE: 404,
    }
)


def reply_for(fault: Fault, *, slow_s: float, retry_after_s: float) -> Reply:
    """Return what makes *fault* happen.

    Args:
        fault: What goes wrong.
        slow_s: How late a slow engine is, in seconds.
        retry_after_s: When a busy engine asks to be asked again, in seconds from now.
    """
    if fault is Fault.SLOW_FIRST_TOKEN:
        return Reply(before_s=slow_s)
    if fault is Fault.SLOW_TOKENS:
        return Reply(token_s=slow_s)
    later = {
        Fault.BUSY: f"{retry_after_s:g}",
        Fault.BUSY_UNTIL: formatdate(time.time() + retry_after_s, usegmt=True),
    }.get(fault)
    headers = (("retry-after", later),) if later is not None else ()
    return Reply(status=STATUS.get(fault, 200), headers=headers, fault=fault)
