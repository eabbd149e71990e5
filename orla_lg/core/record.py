"""Step 7, account: what was decided for one call, what then happened, and who is told.

A ``Record`` is made when its call ends. Listeners get a ``CallEvent`` at each turn, in the thread where it happens.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from math import isfinite
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.cache.verification import KEEP_ORDERS
from orla_lg.core.call import CacheHint, Call, Considered
from orla_lg.core.identity import workflow_key
from orla_lg.errors import RecordUnknown

log = logging.getLogger("orla_lg")


@dataclass(frozen=True, slots=True)
class Record:
    """One call: what was decided and what happened. Times in seconds; ``None`` means not known."""

    id: str
    workflow: str
    """The thread's id, else the run's, else one made of the call's; the ``tenant``'s, if there is one."""
    run: str | None
    stage: str
    step: int | None
    backend: str | None
    """``None`` for a call that was never placed."""
    model: str | None
    """The model asked for at the backend."""
    mapper: str | None
    reason: str
    priority: float
    tenant: str | None
    queue_wait_s: float
    ttft_s: float | None
    """From the grant to the first chunk, with the swap of its slot; ``None`` where nothing was streamed."""
    duration_s: float
    """From the call's arrival to its last token."""
    prompt_tokens: int | None
    cached_tokens: int | None
    completion_tokens: int | None
    cache_action: str
    """``reused``, ``claimed`` or ``reclaimed`` slot; ``restored``: filled with what was saved of the workflow;
    ``recomputed``: that failed, or the engine found less than half of what should have been there; ``engine`` where
    it manages by itself."""
    attempts: int
    cost_usd: float | None
    error: str | None
    """The exception's name and text, or ``abandoned`` for a stream nobody read to its end."""
    external: bool
    """The call was not ours to place and went where its code says."""
    variant: str | None = None
    """The named overrides of the mapping that its run used."""
    considered: tuple[Considered, ...] = ()
    """The backends that the mapper weighed, with the numbers it saw."""
    expected_cached_tokens: int | None = None
    """Of the prompt, what we believed to be in the engine's cache when the call went."""
    cache_orders: tuple[str, ...] = ()
    """What was asked about its workflow's cache after it, each with its effect: ``pin:pinned``. The newest eight."""
    cache_borne_out: bool | None = None
    """Whether the workflow's next call there found what those effects, or doing nothing, promise; ``None``: no such
    call yet, or nothing was promised, or less than the slack that engines are given
    (``core.cache.verification.SLACK_TOKENS``)."""
    cache_hint: CacheHint | None = None
    """What was said of its workflow's cache, whatever came of it (``Hints.cache``)."""
    final_odds: float | None = None
    """How likely it was its run's last call, where the order of the queue went by that (policy ``final_first``)."""

    @property
    def key(self) -> str:
        """The workflow's key, tenant and all."""
        return workflow_key(self.workflow, self.tenant)

    def asdict(self) -> dict[str, Any]:
        """Return the record as a plain dict that JSON can carry."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["cache_orders"] = list(self.cache_orders)
        plain["considered"] = [
            {"backend": each.backend, "numbers": _finite(each.numbers), "verdict": each.verdict}
            for each in self.considered
        ]
        return plain


@dataclass(eq=False, slots=True)
class CacheFollowUp:
    """What became known of a call's cache after its record was made."""

    workflow: str
    """Its key."""
    orders: tuple[str, ...]
    borne_out: bool | None


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    """Return *numbers* without what JSON has no word for: a mapper may say that something takes for ever."""
    return {name: value if isfinite(value) else None for name, value in numbers.items()}


class Happening(StrEnum):
    """The turns of a call's, a run's and a node's life."""

    RUN_STARTED = "run_started"
    RUN_ENDED = "run_ended"
    NODE_ENTERED = "node_entered"
    NODE_LEFT = "node_left"
    STAGES_NEXT = "stages_next"
    TOOL_STARTED = "tool_started"
    TOOL_ENDED = "tool_ended"
    TOOL_BEGAN_EARLY = "tool_began_early"
    TOOL_HANDED_OVER = "tool_handed_over"
    QUEUED = "queued"
    DISPATCHED = "dispatched"
    FIRST_TOKEN = "first_token"
    FINISHED = "finished"


@dataclass(frozen=True, slots=True)
class CallEvent:
    """Something happened, now."""

    kind: Happening
    at_s: float
    """Monotonic seconds."""
    workflow: str
    run: str | None = None
    stage: str = ""
    call: str | None = None
    backend: str | None = None
    detail: str = ""
    """A tool's name, or how a run ended."""
    record: Record | None = None
    """With ``FINISHED``."""
    tenant: str | None = None
    """The workflow's; ``None`` where none was named."""
    hidden_s: float | None = None
    """With ``TOOL_HANDED_OVER``: so much of an early tool's time passed before its turn."""


Listener = Callable[[CallEvent], None]


@dataclass(eq=False, slots=True)
class _Subscription:
    listener: Listener
    failure_logged: bool = False


class RecordBook:
    """The newest records, and the listeners.

    Args:
        keep: How many records are kept.
        followers: Called with each record when it is made.
    """

    def __init__(self, keep: int, followers: Sequence[Callable[[Record], None]] = ()) -> None:
        self._lock = threading.Lock()
        self.followers = list(followers)
        """Called with each record: what sums up, learns."""
        self.written: Callable[[Record, Call | None], None] | None = None
        """Writes each record down, with what is to be known of its call; ``None``: there is no file."""
        self._records = BoundedDict[str, Record](keep)
        self._late = BoundedDict[str, CacheFollowUp](keep)
        """What records do not say yet: making one anew costs more than a call should, so it waits for a reader."""
        self._listeners: tuple[_Subscription, ...] = ()
        self.heard = False
        """Whether there is a listener, so that an event is worth making."""
        self.total = 0
        self.external = 0
        """Of the calls, those that the core did not place."""

    def add(self, record: Record, call: Call | None = None) -> None:
        """Keep a record, and have it summed up, written down and learned from; the oldest goes when it is full."""
        with self._lock:
            self._records.set(record.id, record)
            self.total += 1
            self.external += record.external
        if self.written is not None:
            self.written(record, call)
        for follower in self.followers:
            follower(record)

    def ordered(self, record_id: str, order: str) -> CacheFollowUp | None:
        """Put down what came of an order about its cache; returns all that is known, if the record is still kept."""
        with self._lock:
            if (late := self._aftermath(record_id)) is not None:
                late.orders = (*late.orders, order)[-KEEP_ORDERS:]
            return late

    def judged(self, record_id: str, borne_out: bool | None) -> CacheFollowUp | None:
        """Put down whether the next call bore it out; returns all that is known, if the record is still kept."""
        with self._lock:
            if (late := self._aftermath(record_id)) is not None:
                late.borne_out = borne_out
            return late

    def _aftermath(self, record_id: str) -> CacheFollowUp | None:
        if (late := self._late.get(record_id)) is None and (known := self._records.get(record_id)) is not None:
            late = CacheFollowUp(known.key, known.cache_orders, known.cache_borne_out)
            self._late.set(record_id, late)
        return late

    def _write_in(self, record_id: str) -> Record | None:
        """Return a record as it stands now."""
        known, late = self._records.get(record_id), self._late.pop(record_id)
        if known is not None and late is not None:
            known = replace(known, cache_orders=late.orders, cache_borne_out=late.borne_out)
            self._records.replace(record_id, known)
        return known

    def latest(self, record: Record) -> Record:
        """Return a record as it stands now."""
        with self._lock:
            return self._write_in(record.id) or record

    def records(self) -> list[Record]:
        """Return the kept records, oldest first."""
        with self._lock:
            for record_id in list(self._late):
                self._write_in(record_id)
            return self._records.values()

    def find(self, record_id: str) -> Record:
        """Return a kept record.

        Raises:
            RecordUnknown: There was none, or it is no longer kept.
        """
        with self._lock:
            found = self._write_in(record_id)
        if found is None:
            kept = f"the newest {len(self._records)} are kept, {self.dropped} older ones are gone"
            raise RecordUnknown(f"no record {record_id!r}: {kept}")
        return found

    @property
    def dropped(self) -> int:
        """How many records no longer fit."""
        return self.total - len(self._records)

    def subscribe(self, listener: Listener) -> Callable[[], None]:
        """Tell *listener* every ``CallEvent`` from now on; returns a function that ends that."""
        mine = _Subscription(listener)
        with self._lock:
            self._listeners, self.heard = (*self._listeners, mine), True

        def unsubscribe() -> None:
            with self._lock:
                self._listeners = tuple(each for each in self._listeners if each is not mine)
                self.heard = bool(self._listeners)

        return unsubscribe

    def tell(self, event: CallEvent) -> None:
        """Tell the listeners; one that fails is logged, once, and does not disturb the call."""
        for each in self._listeners:
            try:
                each.listener(event)
            except Exception:  # a listener is the user's code; its fault must not end a call
                if not each.failure_logged:
                    each.failure_logged = True
                    log.exception(
                        "a listener of orla_lg failed on %s; no further failure of it is logged", event.kind
                    )
