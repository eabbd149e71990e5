"""What happened to calls, kind by kind of fault: the verdict, and the time until calls flowed again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from bench.lib.figures import percentile, table


class Call(NamedTuple):
    """One call of a replica; moments are monotonic."""

    replica: str
    stage: str
    takes_s: float
    """At the engine."""
    begun_s: float
    ended_s: float | None = None
    error: str = ""


class Flow(NamedTuple):
    """How long after a fault calls flowed again."""

    first_s: float
    """From any replica."""
    all_s: float
    """From each of those that live."""


def flow(calls: Iterable[Call], stage: str, fault_s: float, replicas: Iterable[str]) -> Flow | None:
    """Return how long after a fault the first call left for its engine that began after it; ``None``: not all did."""
    first: dict[str, float] = {}
    for call in calls:
        if call.stage == stage and call.begun_s > fault_s and call.ended_s is not None and not call.error:
            left_s = max(0.0, call.ended_s - call.takes_s - fault_s)
            first[call.replica] = min(left_s, first.get(call.replica, left_s))
    wanted = [first.get(name) for name in replicas]
    found = [each for each in wanted if each is not None]
    return Flow(min(first.values()), max(found)) if found and len(found) == len(wanted) else None


@dataclass
class Row:
    """One kind of fault, as often as it was made."""

    kind: str
    faults: int = 0
    calls: int = 0
    cut: int = 0
    """Under way in a process that was killed: its runner's to repeat."""
    errors: Counter[str] = field(default_factory=Counter)
    lost: int = 0
    twice: int = 0
    most: dict[str, int] = field(default_factory=dict)
    """By engine, how many requests it had at once."""
    flows: list[Flow] = field(default_factory=list)
    may_end_with: frozenset[str] = frozenset()
    """Errors that this kind is allowed."""
    stalls: list[str] = field(default_factory=list)
    """What did not come in time, or failed, and what the site was at then; the first line of each says what."""

    def add(self, other: Row) -> None:
        """Take in what happened at another site, to the same kind."""
        self.faults, self.calls, self.cut = self.faults + other.faults, self.calls + other.calls, self.cut + other.cut
        self.lost, self.twice = self.lost + other.lost, self.twice + other.twice
        self.errors += other.errors
        names = {**self.most, **other.most}
        self.most = {name: max(self.most.get(name, 0), other.most.get(name, 0)) for name in names}
        self.flows += other.flows
        self.stalls += other.stalls

    def stalled(self) -> list[str]:
        """Return in a line each what did not come in time."""
        return [f"{self.kind}: stalled {each.partition(chr(10))[0]}" for each in self.stalls]

    def wrong(self, bounds: Mapping[str, int]) -> list[str]:
        """Return what must not be."""
        found = []
        if self.lost:
            found.append(f"{self.lost} calls lost")
        if self.twice:
            found.append(f"{self.twice} calls at an engine twice")
        if not self.calls:
            found.append("no call ended")
        found += [f"{most} of {bounds[name]} at once at {name}" for name, most in self.most.items()
                  if most > bounds[name]]  # fmt: skip
        found += [f"{times} calls ended with {name}" for name, times in self.errors.items()
                  if name not in self.may_end_with]  # fmt: skip
        return [*self.stalled(), *(f"{self.kind}: {each}" for each in found)]

    def shown(self, bounds: Mapping[str, int]) -> list[str]:
        """Return the row of the table."""
        errors = "; ".join(f"{times} {name}" for name, times in self.errors.items()) or "0"
        most = ", ".join(f"{self.most.get(name, 0)} of {bound}" for name, bound in bounds.items())
        return [
            self.kind, f"{self.faults}", f"{self.calls:,}", f"{self.lost}", f"{self.twice}", f"{self.cut}", errors,
            most,
            spread([each.first_s for each in self.flows]), spread([each.all_s for each in self.flows]),
        ]  # fmt: skip


def spread(seconds: Sequence[float]) -> str:
    """Return median, p95 and the most."""
    return (
        " / ".join(f"{of:.1f}" for of in (median(seconds), percentile(seconds, 0.95), max(seconds)))
        if seconds
        else "–"
    )


HEAD = (
    "fault", "times", "calls", "lost", "twice", "cut off with their process", "errors", "most at once",
    "calls flow again, s: median / p95 / most", "from each replica, s: median / p95 / most",
)  # fmt: skip


def shown(rows: Iterable[Row], bounds: Mapping[str, int]) -> list[str]:
    """Return the table."""
    return table(HEAD, (row.shown(bounds) for row in rows))
