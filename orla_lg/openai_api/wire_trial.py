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

_MISSED = ("'messages' is required", "'input' is required")
"""How llama.cpp says of a path that it has what an empty request lacks, be it with a status of its own fault."""

_MALFORMED = (400, 422)
_LATER = (408, 409, 425, 429, 500, 502, 503, 504, 529)
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
        answers = dict(zip(wires, await self._are_there([ASKED[wire] for wire in wires]), strict=True))
        if any(answers.values()) and (await self._are_there([NO_WIRE]))[0]:
            answers = dict.fromkeys(wires, False)
        self._known |= {wire: answer for wire, answer in answers.items() if answer is not None}

    async def _are_there(self, paths: list[str]) -> list[bool | None]:
        async with asyncio.TaskGroup() as group:
            asked = [group.create_task(self._is_there(path)) for path in paths]
        return [each.result() for each in asked]

    async def _is_there(self, path: str) -> bool | None:
        """Return whether the engine has *path*; ``None`` where its answer says nothing of that.

        One that takes a request for nothing answers everything alike, with a page.
        """
        where = self._adapter.root + path
        headers = _VERSION | ({"x-api-key": key} if (key := self._adapter.key_for(where)) else {})
        try:
            await self._adapter.ask("POST", where, {}, timeout_s=TIMEOUT_S, headers=headers)
        except EngineRefused as error:
            if any(missed in str(error) for missed in _MISSED):
                return True
            return None if error.status in _LATER else error.status in _MALFORMED
        except BackendUnavailable:
            return None
        return False
