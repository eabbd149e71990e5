"""An engine's cache events, read on the background loop for as long as the ``Orla`` is open."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import Context

from orla_lg.core.background import Background
from orla_lg.core.cache.prefix.blocks import CachedBlocks
from orla_lg.core.engine.capabilities import BlocksCleared, KVEvent, KVEventSource
from orla_lg.errors import OrlaClosed

log = logging.getLogger("orla_lg")


class KVFeed:
    """Carries one engine's events into the account of its cache."""

    def __init__(
        self, source: KVEventSource, blocks: CachedBlocks, background: Background, lock: threading.Lock, backend: str
    ) -> None:
        self._source = source
        self._blocks = blocks
        self._background = background
        self._lock = lock
        self._backend = backend
        self._reading: Future[None] | None = None
        self._pid = 0

    def begin(self) -> None:
        """Read from now on, if the backend has events that are not read yet. Called under the lock.

        Idempotent, and to be called again now and then: a fork leaves the reader behind.
        """
        if self._reading is not None and not self._reading.done() and self._pid == os.getpid():
            return
        batches = self._source.kv_events()
        if batches is None:
            return
        self._pid = os.getpid()
        with contextlib.suppress(OrlaClosed):
            # Not in the context of the call that happened to come first: the reader outlives its graph.
            self._reading = Context().run(self._background.submit, self._read(batches))
            self._reading.add_done_callback(self._ended)

    async def _read(self, batches: AsyncGenerator[Sequence[KVEvent]]) -> None:
        with self._lock:
            self._blocks.apply(BlocksCleared(missed=True))  # of what was stored before, no event will tell the end
            self._blocks.listening = True
        async with contextlib.aclosing(batches):
            async for events in batches:
                with self._lock:
                    for event in events:
                        self._blocks.apply(event)

    def _ended(self, reading: Future[None]) -> None:
        self._blocks.listening = False
        with contextlib.suppress(CancelledError):
            if (error := reading.exception()) is not None:
                log.error("reading the KV events of backend %r failed; what its cache holds is believed from "
                          "answers alone until it is probed again", self._backend, exc_info=error)  # fmt: skip
