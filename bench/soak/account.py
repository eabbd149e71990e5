"""The account: every call has one record, every failed run a planned fault; and what the process holds."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from dataclasses import dataclass, field

import psutil

from bench.lib.core import CallEvent, Happening
from bench.soak.workflows import Edge, Run

SETTLE_S = 5.0
"""After its end a run's records may still come: a stream that was dropped ends when it is closed."""
STUCK_S = 60.0


@dataclass(frozen=True)
class Sample:
    """What the process held at an instant."""

    at_s: float
    rss: int
    files: int
    threads: int
    records: int


class UsageAccount:
    """What was begun, what came of it, and what does not fit; safe for threads.

    Args:
        swallow: One record in so many is not counted, for the control that must fail; 0: all are.
    """

    def __init__(self, *, swallow: int = 0) -> None:
        self.open: dict[str, Run] = {}
        self.samples: list[Sample] = []
        self.counts: Counter[str] = Counter()
        self.oddities: deque[str] = deque(maxlen=10)
        self._swallow = swallow
        self._lock = threading.Lock()
        self._ended: deque[Run] = deque()
        self._process = psutil.Process()

    # What happens

    def begin(self, run: Run) -> None:
        """Note a run."""
        with self._lock:
            self.open[run.id] = run
            self.counts["runs"] += 1

    def hear(self, event: CallEvent) -> None:
        """Take in what ``Orla.subscribe`` tells."""
        if event.kind is not Happening.FINISHED or event.record is None:
            return
        with self._lock:
            self.counts["records"] += 1
            self.counts["attempts"] += event.record.attempts
            if self._swallow and self.counts["records"] % self._swallow == 0:
                return
            run = self.open.get(event.record.run or "")
            if run is None:
                self._odd("records of no run", f"record {event.record.id} of run {event.record.run}")
            else:
                run.records += 1

    def end(self, run: Run) -> None:
        """Note that a run ended."""
        run.ended_s = time.monotonic()
        with self._lock:
            self._ended.append(run)

    def settle(self, *, all_of_them: bool = False) -> list[Run]:
        """Judge the runs that ended a while ago; returns them."""
        settled, until_s = [], time.monotonic() - (0.0 if all_of_them else SETTLE_S)
        with self._lock:
            while self._ended and (self._ended[0].ended_s or 0.0) <= until_s:
                run = self._ended.popleft()
                del self.open[run.id]
                self._judge(run)
                settled.append(run)
        return settled

    # What does not fit

    def _judge(self, run: Run) -> None:
        self.counts["calls"] += len(run.begun)
        self.counts["injected"] += sum(plan.fault is not None for plan in run.begun)
        missing = len(run.begun) - run.records
        if run.cancelled and missing == 1:
            self.counts["cancelled before they were calls"] += (
                1  # the last one was begun in the code, and went nowhere
            )
        elif missing:
            self._odd("calls without their one record", f"run {run.number} ({run.form}): {len(run.begun)} calls, "
                      f"{run.records} records, error {run.error!r}")  # fmt: skip
        if run.wrong:
            self._odd("wrong answers", f"run {run.number}: {run.wrong}")
        if run.cancelled:
            self.counts["cancelled"] += 1
        elif run.error is not None:
            self.counts["failed"] += 1
            self._match(run)
        else:
            self.counts["done"] += 1
            if any(plan.doomed for plan in run.begun) or run.way is Edge.GONE:
                self._odd("answers that no engine gave", f"run {run.number}: {run.begun}")

    def _match(self, run: Run) -> None:
        if any(plan.may_fail for plan in run.begun) or run.way is Edge.GONE:
            self.counts["failed, matched to a fault of their own"] += 1
        elif "circuit of backend" in str(run.error):
            self.counts["failed, matched to an open circuit"] += 1
        else:
            self._odd("failed runs without a fault", f"run {run.number} ({run.form}, {run.way}): {run.error!r}")

    def _odd(self, what: str, which: str) -> None:
        self.counts[what] += 1
        self.oddities.append(f"{what}: {which[:300]}")

    def stuck(self) -> int:
        """Return how many runs have not ended."""
        return len([run for run in self.open.values() if run.ended_s is None])

    # What the process holds

    def sample(self) -> Sample:
        """Look at memory, files and threads."""
        with self._process.oneshot():
            sample = Sample(
                time.monotonic(), self._process.memory_info().rss, self._process.num_fds(),
                _threads(), self.counts["records"],
            )  # fmt: skip
        self.samples.append(sample)
        return sample


def _threads() -> int:
    """Return how many threads there are, but for the pools' that call: those grow to their size and stay."""
    return sum(not thread.name.startswith(("soak_", "asyncio_")) for thread in threading.enumerate())


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    what: str
    found: str
    wanted: str
    good: bool = field(default=True)
