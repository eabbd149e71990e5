"""Mappers that learn: those with ``note(record)`` hear of every finished call, those with ``feedback`` of scores."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any

from orla_lg.core.mapping import Mapper, parts_of
from orla_lg.core.record import Record

log = logging.getLogger("orla_lg")


class Learners:
    """The parts of all mappers in use that want to learn.

    A mapper given to ``wrap`` lives as long as its graph, so it is not kept alive here.

    Args:
        follow: Has ``note`` called with every record from then on; asked once there is something that learns.
    """

    def __init__(self, follow: Callable[[Callable[[Record], None]], None] | None = None) -> None:
        self._lock = threading.Lock()
        self._follow = follow
        self._known: tuple[Callable[[], Any], ...] = ()
        self.scores = 0
        """How many scores were given."""

    def enlist(self, mapper: Mapper | None) -> None:
        """Tell the parts of *mapper* from now on. Idempotent."""
        eager = [part for part in parts_of(mapper) if hasattr(part, "note") or hasattr(part, "feedback")]
        if not eager:
            return
        with self._lock:
            alive = [reference for reference in self._known if reference() is not None]
            known = {id(reference()) for reference in alive}
            self._known = (*alive, *(_reference(part) for part in eager if id(part) not in known))
            follow, self._follow = self._follow, None
        if follow is not None:
            follow(self.note)

    def note(self, record: Record) -> None:
        """Tell how a call went, if the core placed it."""
        if self._known and not record.external:
            self._tell("note", record)

    def feedback(self, record: Record, score: float) -> None:
        """Tell how good a call's answer was."""
        with self._lock:
            self.scores += 1
        self._tell("feedback", record, score)

    def _tell(self, method: str, *said: Any) -> None:
        for told in self._having(method):
            try:
                told(*said)
            except Exception:  # a mapper may be the user's code; what it fails to learn must not end a call
                log.exception("a mapper failed in %s()", method)

    def _having(self, method: str) -> Iterable[Callable[..., None]]:
        for reference in self._known:
            if (told := getattr(reference(), method, None)) is not None:
                yield told


def _reference(part: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(part)
    except TypeError:  # a class with slots and without ``__weakref__``
        return lambda: part
