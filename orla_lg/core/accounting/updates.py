"""What becomes known of a call's cache after its record was written: added to the record at once, to its file once.

Orders come back one by one, and the next call's verdict after them, so a line is written when nothing more is to be
expected: at the verdict, or when the workflow's last run has ended; what comes later still has a line of its own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from orla_lg.core.accounting.journal import Journal
from orla_lg.core.cache.verification import Order, Verification
from orla_lg.core.record import CacheFollowUp, RecordBook

MANY = 100
"""Of one workflow, so many records wait for their line: then all are written, as far as is known."""


class RecordUpdates:
    """Puts down what became of calls' caches.

    Args:
        records: Whose records learn of it.
        journal: Their file; ``None``: there is none.
        is_running: Whether a workflow has a run open, so that more is to be expected.
    """

    def __init__(self, records: RecordBook, journal: Journal | None, is_running: Callable[[str], bool]) -> None:
        self._records = records
        self._journal = journal
        self._is_running = is_running
        self._lock = threading.Lock()
        self._unwritten: dict[str, dict[str, CacheFollowUp]] = {}
        """By workflow and record, what the file does not say yet."""

    def ordered(self, record_id: str, order: Order) -> None:
        """Note what came of an order that followed a call."""
        late = self._records.ordered(record_id, str(order))
        if late is None or self._journal is None:
            return
        with self._lock:
            waiting = self._unwritten.setdefault(late.workflow, {})
            waiting[record_id] = late
            many = len(waiting) > MANY
        # Asked after it was put down: a run that ends at this moment either finds it there or is seen to be over.
        if many or not self._is_running(late.workflow):
            self._write(late.workflow)

    def judged(self, record_id: str, verdict: Verification) -> None:
        """Note whether the next call bore out what was promised after a call."""
        late = self._records.judged(record_id, verdict.borne_out)
        if late is None or self._journal is None:
            return
        with self._lock:
            self._unwritten.get(late.workflow, {}).pop(record_id, None)
        if late.orders or late.borne_out is not None:
            self._journal.amended(record_id, late)

    def run_ended(self, workflow: str) -> None:
        """Write what is known, unless another run of the workflow goes on."""
        if not self._is_running(workflow):
            self._write(workflow)

    def close(self) -> None:
        """Write all that is known."""
        for workflow in list(self._unwritten):
            self._write(workflow)

    def _write(self, workflow: str) -> None:
        with self._lock:
            due = self._unwritten.pop(workflow, {})
        for record_id, late in due.items():
            assert self._journal is not None
            self._journal.amended(record_id, late)
