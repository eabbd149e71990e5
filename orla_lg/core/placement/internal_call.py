"""Calls of our own: a chat completion that a decision needs, on its way like any other call."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from orla_lg.core.background import Background
from orla_lg.core.call import Assignment, Call
from orla_lg.core.engine.backend import with_fields
from orla_lg.core.engine.retry import NEVER_S, NOT_IMPLEMENTED, AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.mapping import Planned
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import BackendUnavailable, EngineRefused, OrlaClosed

CLOSED = "this Orla was closed while a call waited for another one's answer"


@dataclass(frozen=True, slots=True)
class InternalMapping:
    """The mapper of an internal call: what makes it says where it goes."""

    backend: str
    stage: str

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment:  # noqa: D102
        return Assignment(self.backend, mapper=self.stage, reason="a call of its own")

    def foretell(self, stage: str) -> Planned:
        """Return where it goes."""
        return Planned(stage, (self.backend,), "a call of its own")


class InternalCall:
    """Sends one body to the backend that was chosen, through its adapter, and returns the answer's text.

    Args:
        body: A chat completion, without its model.
        background: Whose loop adapters run on.
        timeout_s: Seconds that the engine may take for the whole answer.
    """

    max_attempts = 2

    def __init__(self, body: Mapping[str, Any], background: Background, timeout_s: float) -> None:
        self._body = body
        self._background = background
        self._timeout_s = timeout_s

    def send(self, inflight: InFlightCall) -> str:
        """Send from a thread."""
        try:
            return self._background.submit(self._answer(inflight)).result()
        except CancelledError as cut_off:
            raise OrlaClosed(CLOSED) from cut_off

    async def asend(self, inflight: InFlightCall) -> str:
        """Send from a task."""
        try:
            return await asyncio.wrap_future(self._background.submit(self._answer(inflight)))
        except asyncio.CancelledError as cut_off:
            task = asyncio.current_task()
            if task is None or task.cancelling():
                raise
            raise OrlaClosed(CLOSED) from cut_off  # the answer was cancelled, and not its caller

    async def _answer(self, inflight: InFlightCall) -> str:
        assert inflight.scheduler is not None
        adapter, text = inflight.scheduler.adapter, ""
        body = {**with_fields(self._body, inflight.request_fields()), "model": inflight.model}
        try:
            async with (
                asyncio.timeout(self._timeout_s),
                contextlib.aclosing(adapter.generate(body)) as chunks,
            ):
                async for chunk in chunks:
                    inflight.first_token()
                    text += chunk.text
                    if chunk.usage is not None:
                        inflight.saw(chunk.usage)
        except TimeoutError as error:  # not tried again: it would take as long
            raise BackendUnavailable(f"backend {inflight.backend!r}: no answer in {self._timeout_s} s") from error
        except BackendUnavailable as error:
            if text:
                inflight.broke(error)
                raise
            raise AttemptFailed(error, unreachable=True) from error
        except EngineRefused as error:
            if error.status in NOT_IMPLEMENTED:
                raise AttemptFailed(error, overloaded=True, retry_after_s=NEVER_S) from error
            raise AttemptFailed(error, elsewhere=error.status < 500) from error
        inflight.finish()
        return text
