"""A gateway before one engine, as a client meets it: a URL, served by uvicorn."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from orla_lg import Backend, Orla
from orla_lg.core.record import Record
from orla_lg.serve.gateway.settings import GatewaySettings
from tests.conftest import BACKEND_KEY, assert_nothing_left
from tests.serve.gateway.served import GatewayServer

PATIENCE_S = 60.0


@dataclass
class Gateway:
    """One that runs."""

    root: str
    engine: Any
    """Behind it."""
    orla: Orla
    _forgotten: set[str] = field(default_factory=set)

    @property
    def url(self) -> str:
        """The base URL of OpenAI's clients."""
        return f"{self.root}/v1"

    def forget(self) -> None:
        """Leave out of ``records`` what was recorded up to now."""
        self._forgotten = {record.id for record in self.orla.records()}

    def records(self, calls: int = 0) -> list[Record]:
        """Return the records of the calls, the oldest first, as soon as there are *calls* of them."""
        deadline = time.monotonic() + PATIENCE_S
        while True:
            found = [record for record in self.orla.records() if record.id not in self._forgotten]
            if len(found) >= calls:
                return found
            assert time.monotonic() < deadline, f"{len(found)} of {calls} calls have a record"
            time.sleep(0.005)


@contextmanager
def running_gateway(engine: Any, **settings: Any) -> Iterator[Gateway]:
    """Run a gateway before an engine that stands under its only backend; at the end, nothing may be left in the core.

    Args:
        engine: With a ``url``.
        settings: Of the gateway.
    """
    orla = Orla([Backend("main", engine.url, api_key=BACKEND_KEY)], mapper={"*": "main"})
    try:
        with GatewayServer(orla, settings=GatewaySettings(**settings)) as server:
            yield Gateway(server.url, engine, orla)
        assert_nothing_left(orla)
    finally:
        orla.close()
