"""What a core holds that no garbage collector frees: a thread with its connections, a file being written, a socket.

``close`` gives all of it back. A core that is dropped without it (``Orla(…).wrap(graph)``, and the graph goes) gives
it back when it is collected, and one that is still there when the interpreter ends gives it back then. A core is
dropped when neither its ``Orla``, nor a wrapped graph, a model, a saver, nor a call or stream under way refers to it
any more; so nothing in here, and nothing that the loop of its thread keeps for long, may refer to it.

A collector runs anywhere, in a thread that holds any lock, so what it calls must take none that such a thread could
hold, and wait for nothing: it has the core's own thread do the work.
"""

from __future__ import annotations

import atexit
import logging
import os
import time
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from typing import Protocol

from orla_lg.core.accounting.journal import Journal
from orla_lg.core.accounting.updates import RecordUpdates
from orla_lg.core.background import Background
from orla_lg.core.boundary.masking import Masking
from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.lookahead.lookahead import Lookahead
from orla_lg.core.services import Services

log = logging.getLogger("orla_lg")

EXIT_PATIENCE_S = 3.0
"""How long the end of the interpreter waits for all cores that were not closed."""


class Resources:
    """The resources of one core.

    Args:
        background: Its thread.
        adapters: By backend; closed on that thread.
        journal: Its records file, if there is one.
    """

    def __init__(
        self, background: Background, adapters: Mapping[Backend, BackendAdapter], journal: Journal | None
    ) -> None:
        self.masking = Masking(key for backend in adapters for key in (backend.api_key, backend.admin_key))
        """Takes keys out of what is recorded and logged."""
        self._background = background
        self._adapters = list(adapters.values())
        self._journal = journal
        self._pid = os.getpid()
        self._closers: list[Callable[[], object]] = []

    def add(self, closer: Callable[[], object]) -> None:
        """Call *closer* at the end, unless ``close`` was called; it must not refer to the core, nor wait long."""
        self._closers.append(closer)

    def enlist(self, backend: Backend, adapter: BackendAdapter) -> None:
        """Take in the adapter and the keys of a backend that came while the core ran."""
        self._adapters.append(adapter)
        self.masking.add(backend.api_key, backend.admin_key)

    def dismiss(self, adapter: BackendAdapter) -> None:
        """Leave out an adapter that is closed; keys stay masked."""
        self._adapters.remove(adapter)

    def let_go(self) -> None:
        """Have everything given back; waits for nothing. In a forked child, only what that has begun itself."""
        if self._journal is not None:
            self._journal.end()
        if not self.is_own:
            self._background.end([], _nothing)
        elif not self._background.end([adapter.aclose for adapter in self._adapters], self._call_closers):
            self._call_closers()  # nothing was ever begun on the thread

    def _call_closers(self) -> None:
        for closer in self._closers:
            try:
                closer()
            except Exception:
                log.debug("something of a dropped Orla could not be closed", exc_info=True)

    @property
    def is_own(self) -> bool:
        """Whether this process made them, and not one that it was forked from."""
        return self._pid == os.getpid()

    def wait(self, until_s: float) -> None:
        """Wait for the end of the threads, until a moment of ``time.monotonic`` at most."""
        self._background.join(max(0.0, until_s - time.monotonic()))
        if self._journal is not None:
            self._journal.join(max(0.0, until_s - time.monotonic()))


def _nothing() -> None:
    """Nothing is left to be done."""


class OpenCore(Protocol):
    """What the resources of a core need of it (``serving.Serving``)."""

    background: Background
    lookahead: Lookahead
    journal: Journal | None
    resources: Resources
    services: Services
    updates: RecordUpdates


_open: weakref.WeakKeyDictionary[OpenCore, weakref.finalize] = weakref.WeakKeyDictionary()  # type: ignore[type-arg]


def hold(serving: OpenCore, adapters: Mapping[Backend, BackendAdapter], *, owned: bool) -> Resources:
    """Return the resources of *serving*, to be given back when it is dropped, or when the interpreter ends.

    Args:
        serving: The core.
        adapters: Of its backends.
        owned: Whether its thread is its own; one that is lent is its owner's to end.
    """
    resources = Resources(serving.background, adapters, serving.journal)
    resources.add(serving.lookahead.saver)
    if owned:
        log.addFilter(resources.masking)
        resources.add(partial(log.removeFilter, resources.masking))
        finalizer = weakref.finalize(serving, resources.let_go)
        finalizer.atexit = False  # ``_at_exit`` waits, too
        _open[serving] = finalizer
    return resources


def was_closed(serving: OpenCore) -> None:
    """Note that everything is given back by ``close``."""
    log.removeFilter(serving.resources.masking)
    if (finalizer := _open.pop(serving, None)) is not None:
        finalizer.detach()


@atexit.register
def _at_exit() -> None:
    """Give back what cores hold that are still open, with what they have not written yet."""
    left = list(_open.items())
    for serving, finalizer in left:
        serving.services.closed = True
        if serving.resources.is_own:
            serving.updates.close()
        finalizer.detach()  # and not called: by now ``weakref`` may call none any more
        serving.resources.let_go()
    until_s = time.monotonic() + EXIT_PATIENCE_S
    for serving, _ in left:
        serving.resources.wait(until_s)
