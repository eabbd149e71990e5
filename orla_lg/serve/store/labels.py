"""Which stages with labels workflows entered, kept in the store: the next core goes on with it.

It is written at once, where something is new: what came behind would be lost with a crash, and a label with it. What
a store that is away does not take is written once it answers again.
"""

from __future__ import annotations

import base64
import logging
import threading
from collections.abc import Callable

from orla_lg.core.guard.labels import LabelFlow
from orla_lg.serve.store.store import Store, StoreUnavailable

log = logging.getLogger("orla_lg")

LABELS = "labels/workflow/"
FORGOTTEN = "labels/forgotten"

MOST_AT_ONCE = 100
"""Of what was due, so many are written with one tick."""


class LabelKeeper:
    """Keeps what a core's workflows entered.

    Args:
        store: Where it is kept.
        may_write: Whether this core still decides.
    """

    def __init__(self, store: Store, may_write: Callable[[], bool]) -> None:
        self._store = store
        self._may_write = may_write
        self._complained = False
        self._lock = threading.Lock()
        self._due: dict[str, bytes | None] = {}
        """What the store did not take, by key."""

    def join(self, flow: LabelFlow) -> None:
        """Take over what the core before has left, and keep what comes.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        kept = sorted(self._store.scan(LABELS).items(), key=lambda entry: entry[1].version)
        forgotten = self._store.get(FORGOTTEN)
        flow.restore(
            {name.removeprefix(LABELS): entry.value for name, entry in kept},
            None if forgotten is None else base64.b64decode(forgotten.value),
        )
        flow.store = self

    def keep(self, workflow: str, value: bytes | None) -> None:
        """Keep a workflow's state (``LabelStore``)."""
        self._put(LABELS + workflow, value)

    def keep_forgotten(self, value: bytes) -> None:
        """Keep which workflows are forgotten (``LabelStore``)."""
        self._put(FORGOTTEN, base64.b64encode(value))

    def look(self) -> None:
        """Write what the store did not take; called with each tick."""
        if self._due and self._may_write():
            with self._lock:
                self._flush()

    def _put(self, key: str, value: bytes | None) -> None:
        with self._lock:
            is_first = not self._due
            self._due.pop(key, None)
            self._due[key] = value
            if is_first and self._may_write():
                self._flush()

    def _flush(self) -> None:
        """Write what is due, as far as the store takes it."""
        for key in list(self._due)[:MOST_AT_ONCE]:
            try:
                self._store.put(key, self._due[key])
            except StoreUnavailable as error:
                if not self._complained:
                    self._complained = True
                    log.warning(
                        "the labels of workflows cannot be kept: %s. This core goes by them, and keeps them once its "
                        "store answers; one that takes over before does not know those that are new", error,
                    )  # fmt: skip
                return
            del self._due[key]
        self._complained = False
