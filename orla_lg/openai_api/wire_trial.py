"""Which wires beside OpenAI's oldest an engine speaks: asked with requests that ask for nothing, and read from how
they are refused.

An engine that has the path refuses an empty request as malformed, one that does not have it says that. Both cost the
engine nothing. What is not known counts as not spoken: a request is then translated, which is right in any case.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Protocol

from orla_lg.errors import BackendUnavailable, EngineRefused

ASKED: Mapping[str, str] = {"messages": "v1/messages", "responses": "v1/responses"}
"""By wire, its path from the server's root."""

NO_WIRE = "v1/orla-lg-no-such-wire"
"""A path of no server: what refuses this as malformed too, a gateway perhaps, says nothing of paths."""

TIMEOUT_S = 2.0
"""A busy engine refuses nothing late: routes are looked up before anything is queued."""

AGAIN_S = 600.0
"""How long an answer holds for an engine that shows no restart; one that shows it is asked again at each."""

_MALFORMED = (400, 422)
_FAILED = 500
"""What llama.cpp answers to an empty request on Anthropic's Messages, whose handler raises."""

_LATER = (408, 409, 425, 429, 502, 503, 504, 529)
"""Statuses that say nothing of the path: another time there may be an answer."""

_VERSION = {"anthropic-version": "2023-06-01"}


class CanAsk(Protocol):
    """What a trial needs of its adapter."""

    @property
    def root(self) -> str:
        """The server's own API; ends with a slash."""
        ...

    def key_for(self, path: str) -> str | None:
        """Return the key that the engine wants for *path*."""
        ...

    async def ask(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        *,
        timeout_s: float,
        headers: Mapping[str, str] | None = None,
    ) -> object:
        """Send one short request.

        Raises:
            BackendUnavailable: The engine does not answer.
            EngineRefused: It answered with an error status.
        """
        ...


class WireTrial:
    """What one adapter knows of the wires of its engine; each is asked for once for each start of the engine."""

    def __init__(self, adapter: CanAsk) -> None:
        self._adapter = adapter
        self._known: dict[str, bool] = {}
        self._asked_s = float("-inf")
        self._incarnation: str | None = None
        """Of the engine that was asked; ``None`` where that did not show yet."""

    async def spoken(self, incarnation: str | None = None) -> frozenset[str]:
        """Return the wires of ``ASKED`` that are spoken, after asking for those that are not known.

        Args:
            incarnation: The engine's, where the adapter knows it by now; what was known of another one is forgotten.
        """
        if incarnation is not None:
            if self._incarnation not in (None, incarnation):
                self.forget()
            self._incarnation = incarnation
        if not self._incarnation and time.monotonic() - self._asked_s > AGAIN_S:
            self.forget()
        if left := [wire for wire in ASKED if wire not in self._known]:
            await self._ask(left)
        return frozenset(wire for wire, speaks in self._known.items() if speaks)

    def forget(self) -> None:
        """Know nothing any more, as after the engine was gone."""
        self._known, self._incarnation = {}, None

    async def _ask(self, wires: list[str]) -> None:
        self._asked_s = time.monotonic()
        statuses = await self._statuses([ASKED[wire] for wire in wires])
        elsewhere = None
        if any(status in (*_MALFORMED, _FAILED) for status in statuses):
            (elsewhere,) = await self._statuses([NO_WIRE])
        for wire, status in zip(wires, statuses, strict=True):
            if (speaks := _judged(status, elsewhere)) is not None:
                self._known[wire] = speaks

    async def _statuses(self, paths: list[str]) -> list[int | None]:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._status(path)) for path in paths]
        return [each.result() for each in asked]

    async def _status(self, path: str) -> int | None:
        """Return how the engine answers an empty request; ``None`` where it does not."""
        where = self._adapter.root + path
        headers = _VERSION | ({"x-api-key": key} if (key := self._adapter.key_for(where)) else {})
        try:
            await self._adapter.ask("POST", where, {}, timeout_s=TIMEOUT_S, headers=headers)
        except EngineRefused as error:
            return error.status
        except BackendUnavailable:
            return None
        return 200


def _judged(status: int | None, elsewhere: int | None) -> bool | None:
    """Return whether an engine has a path, by its answer there and *elsewhere*, where no engine has one.

    One that takes a request for nothing answers everything alike, with a page. ``None``: that does not show.
    """
    if status is None or status in _LATER:
        return None
    if status == _FAILED:
        return True if elsewhere is not None and elsewhere not in (_FAILED, *_LATER) else None
    return status in _MALFORMED and elsewhere not in _MALFORMED
