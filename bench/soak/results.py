"""What the samples and the account say at the end: checks, each with what was found and what is wanted."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from bench.lib.core import Statistics
from bench.soak.account import Check, Sample, UsageAccount

WARM_SHARE = 0.3
"""Of the time: caches, pools and books fill."""
LEAST_GROWTH, GROWTH_PER_CALL = 6e6, 250
"""Bytes of memory that may come to it after the warm-up: what allocators keep, and less than a record a call."""
MB = 1e6


def kept(account: UsageAccount) -> list[Check]:
    """Return whether nothing was lost, and every failure is one that was planned."""
    counts = account.counts
    wrongs = (
        "calls without their one record", "records of no run", "failed runs without a fault", "wrong answers",
        "answers that no engine gave",
    )  # fmt: skip
    return [Check(what, f"{counts[what]:,}", "0", counts[what] == 0) for what in wrongs]


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
        Check("runs that did not end", f"{stuck}", "0", stuck == 0),
        Check("calls in flight or waiting at the end", f"{in_flight}", "0", in_flight == 0),
        Check("runs open at the end", f"{now.workflows.runs}", "0", now.workflows.runs == 0),
        Check("calls that passed us by, or without a graph", f"{now.external + now.unidentified}", "0",
              now.external + now.unidentified == 0),
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
