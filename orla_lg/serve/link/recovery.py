"""What a new core waits for before it grants anything: every replica that may hold a grant of the one before.

Each replica that stands in the roster must have said all that it holds (``Ready``), or be over: it ends its own
requests once it had no core for a lease. A fixed pause instead of that is not enough: a replica that is later than
the pause has its calls at the engine all the same. One that is frozen for longer ends nothing: it is passed by, and
what engines say decides from then on (``orphans``). Calls that come meanwhile are held, and enter by age in the end.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from math import inf

from orla_lg.core.boundary.plain import counted
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.link.whereabouts import is_gone
from orla_lg.serve.link.roster import Listed

log = logging.getLogger("orla_lg")

GONE_AFTER_S = 3.0
"""A replica whose process is seen to be gone is waited for so long, for the engines to notice that as well."""

Key = tuple[str, str]
"""Replica and call."""


@dataclass(eq=False, slots=True)
class HeldCall:
    """A call that waits for the end of the recovery."""

    arrived_s: float
    """By this core's clock."""
    enter: Callable[[], None]


@dataclass(eq=False)
class Recovery:
    """The time from the beginning of a core until it may grant. Of the loop's thread, except ``over``.

    Args:
        opened: Called once it is over, when the held calls have entered.
        gone: Called with each replica whose process has ended without a word: it holds nothing any more.
        silent: Called with each that is waited for no more although it said nothing: it may hold something yet.
    """

    opened: Callable[[], None]
    gone: Callable[[Listed], None]
    silent: Callable[[Listed], None]
    over: bool = False
    """Whether grants may be given, as far as this is concerned; any thread may look."""
    waits_for: dict[str, Listed] = field(default_factory=dict)
    _held: dict[Key, HeldCall] = field(default_factory=dict)
    _runs: list[RunShare] = field(default_factory=list)
    _began_s: float = inf
    _patience_s: float = inf
    _joined_s: dict[str, float] = field(default_factory=dict)
    """When a replica lost this core before it had said all: its lease counts from then."""

    def begin(self, roster: Mapping[str, Listed], now: float, patience_s: float) -> None:
        """Wait for those in the roster, *patience_s* seconds from when this core took over at most.

        That is a lease, after which a replica without a core has ended its requests, and the time in which an engine
        notices that they were hung up.
        """
        self.waits_for = dict(roster)
        self._began_s, self._patience_s = now, patience_s
        if self.waits_for:
            log.warning(
                "nothing is granted until it is known what %s of the core before may still hold, at most %g s",
                counted(len(self.waits_for), "replica"), patience_s,
            )  # fmt: skip

    def spoke(self, replica: str) -> None:
        """Note that a replica said all that it holds, or that it holds nothing any more."""
        self.waits_for.pop(replica, None)
        self._joined_s.pop(replica, None)

    def lost(self, replica: Listed, now: float, *, said_all: bool) -> None:
        """Wait for a replica again whose connection was lost: its calls that wait are to keep their order.

        What it holds is known if it *said all*; else its lease, which this core renewed, is waited for anew.
        """
        if not self.over:
            self.waits_for[replica.id] = replica
            self.drop_all(replica.id)
            if not said_all:
                self._joined_s[replica.id] = now

    def look(self, now: float) -> None:
        """End it if it is over."""
        if self.over or self._began_s == inf:
            return
        for each in list(self.waits_for.values()):
            since_s = self._joined_s.get(each.id, self._began_s)
            if now >= since_s + self._patience_s:
                passed = self.silent
            elif now >= since_s + GONE_AFTER_S and is_gone(each.host, each.pid):
                passed = self.gone
            else:
                continue
            del self.waits_for[each.id]
            passed(each)
        if not self.waits_for:
            self._end()

    # What comes meanwhile

    def hold(self, key: Key, arrived_s: float, enter: Callable[[], None]) -> None:
        """Hold a call back; one that is held already stays as it is."""
        self._held.setdefault(key, HeldCall(arrived_s, enter))

    def drop(self, key: Key) -> bool:
        """Forget a call that is held; returns whether it was."""
        return self._held.pop(key, None) is not None

    def drop_all(self, replica: str) -> None:
        """Forget the calls of a replica."""
        for key in [key for key in self._held if key[0] == replica]:
            del self._held[key]

    def held_of(self, replica: str) -> int:
        """Return how many calls of a replica are held."""
        return sum(key[0] == replica for key in self._held)

    def run_came(self, standing: RunShare) -> None:
        """Note a run that began under a core before this one."""
        if not self.over:
            self._runs.append(standing)

    def _end(self) -> None:
        """Let all that came meanwhile arrive in the order in which it began; then the policies choose among it."""
        held, self._held = self._held, {}
        runs, self._runs = self._runs, []
        in_order: list[tuple[float, Callable[[], None]]] = [(each.arrived_s, each.enter) for each in held.values()]
        in_order += [(run.arrived_s, partial(_arrives_now, run)) for run in runs]
        for _, arrive in sorted(in_order, key=lambda each: each[0]):
            arrive()
        self.over = True
        self.opened()


def _arrives_now(run: RunShare) -> None:
    run.order = RunShare().order
