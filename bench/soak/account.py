"""The account: every call has one record, every failed run a planned fault; what the process holds; the checks."""

from __future__ import annotations

import statistics
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import psutil
from rich.console import Console
from rich.table import Table

from bench.lib.core import CallEvent, Happening, Statistics
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

    One record in *swallow* is not counted, for the control that must fail; 0: all are. A *bare* graph has no records:
    its calls count in their place, and its runs are not judged.
    """

    def __init__(self, *, swallow: int = 0, bare: bool = False) -> None:
        self.open, self.samples, self.counts = dict[str, Run](), list[Sample](), Counter[str]()
        self.oddities, self._ended = deque[str](maxlen=10), deque[Run]()
        self._bare, self._swallow, self._lock, self._process = bare, swallow, threading.Lock(), psutil.Process()

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
                if self._bare:
                    self._counted(run)
                else:
                    self._judge(run)
                settled.append(run)
        return settled

    def _counted(self, run: Run) -> None:
        """Count what a bare run called."""
        calls = len(run.begun)
        self.counts["calls"] += calls
        self.counts["records"] += calls
        self.counts["cancelled" if run.cancelled else "done" if run.error is None else "failed"] += 1

    def _judge(self, run: Run) -> None:
        self.counts["calls"] += len(run.begun)
        self.counts["injected"] += sum(plan.fault is not None for plan in run.begun)
        missing = len(run.begun) - run.records
        if run.cancelled and missing == 1:
            self.counts["cancelled before they were calls"] += 1  # it was begun in the code, and went nowhere
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

    def sample(self) -> Sample:
        """Look at memory, files and threads."""
        # The threads of the pools that call do not count: they grow to their size and stay.
        threads = sum(not thread.name.startswith(("soak_", "asyncio_")) for thread in threading.enumerate())
        with self._process.oneshot():
            rss, files = self._process.memory_info().rss, self._process.num_fds()
        self.samples.append(Sample(time.monotonic(), rss, files, threads, self.counts["records"]))
        return self.samples[-1]


WARM_SHARE = 0.3
"""Of the time: caches, pools and books fill."""
LEAST_GROWTH, GROWTH_PER_CALL = 6e6, 250
"""Bytes of memory that may come to it after the warm-up: what allocators keep, and less than a record a call."""
MB = 1e6


class Check(NamedTuple):
    """One line of the table."""

    what: str
    found: str
    wanted: str
    good: bool


def zero(what: str, found: int) -> Check:
    return Check(what, f"{found:,}", "0", found == 0)


def most(what: str, shown: str, found: int, before: int, more: int) -> Check:
    """Return whether of something no more than so many came to what was there before."""
    return Check(f"{what} after close(), beside before", f"{shown} / {before}", f"at most {more} more",
                 found <= before + more)  # fmt: skip


def kept(account: UsageAccount) -> list[Check]:
    """Return whether nothing was lost, and every failure is one that was planned."""
    wrongs = (
        "calls without their one record", "records of no run", "failed runs without a fault", "wrong answers",
        "answers that no engine gave",
    )  # fmt: skip
    return [zero(what, account.counts[what]) for what in wrongs]


def flat(samples: Sequence[Sample]) -> list[Check]:
    """Return whether memory, files and threads stay as they are once the process is warm.

    Files and threads come and go with the load; what leaks lifts what is held in quiet moments, the lowest fifth.
    """
    warm = samples[int(len(samples) * WARM_SHARE) :]
    if len(warm) < 12:
        return [Check("memory, files and threads", "too few samples", "at least 12 after the warm-up", good=False)]
    calls = warm[-1].records - warm[0].records
    seconds = warm[-1].at_s - warm[0].at_s
    slope = statistics.linear_regression([each.at_s for each in warm], [each.rss for each in warm]).slope
    growth, allowed = slope * seconds, max(LEAST_GROWTH, GROWTH_PER_CALL * calls)
    found = f"{growth / MB:+.1f} MB in {calls:,} calls, {warm[-1].rss / MB:.0f} MB at the end"
    checks = [Check("memory, by its slope", found, f"at most {allowed / MB:+.1f} MB", growth <= allowed)]
    views: list[tuple[str, Callable[[Sample], int]]] = [
        ("open files", lambda each: each.files), ("threads", lambda each: each.threads)
    ]  # fmt: skip
    third = len(warm) // 3
    for what, of in views:
        early, late = (statistics.quantiles(map(of, part), n=5)[0] for part in (warm[:third], warm[-third:]))
        allowed = early + max(8, 0.15 * early)
        checks.append(Check(what, f"{early:.0f}, later {late:.0f}", f"at most {allowed:.0f}", late <= allowed))
    return checks


def idle(now: Statistics, stuck: int, written: int, records: int) -> list[Check]:
    """Return whether nothing is under way after the end, and the records file holds every record."""
    in_flight = sum(backend.queue.in_flight + backend.queue.waiting for backend in now.backends.values())
    return [
        zero("runs that did not end", stuck),
        zero("calls in flight or waiting at the end", in_flight),
        zero("runs open at the end", now.workflows.runs),
        zero("calls that passed us by, or without a graph", now.external + now.unidentified),
        Check("records in the file, and counted as unwritten", f"{written:,} + {now.unwritten:,}", f"{records:,}",
              written <= records <= written + now.unwritten),
    ]  # fmt: skip


def show(account: UsageAccount, checks: Sequence[Check], title: str) -> None:
    """Print what was run, and the checks."""
    counts = account.counts
    console = Console(width=118)
    ran = Table(title=title, show_header=False)
    for what in (
        "runs", "done", "failed", "failed, matched to a fault of their own", "failed, matched to an open circuit",
        "cancelled", "calls", "cancelled before they were calls", "records", "attempts", "injected",
        "not begun: too many open",
    ):  # fmt: skip
        ran.add_row(what, f"{counts[what]:,}")
    console.print(ran)
    table = Table("check", "found", "wanted", "")
    for check in checks:
        table.add_row(check.what, check.found, check.wanted, "[green]good[/]" if check.good else "[red]BAD[/]")
    console.print(table)
    for oddity in account.oddities:
        console.print(oddity, markup=False, highlight=False)
