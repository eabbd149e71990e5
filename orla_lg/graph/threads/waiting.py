"""How long a run waits for a thread that another one has, and what it ends with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal

from orla_lg.core.boundary.checked import choice, is_number
from orla_lg.errors import BackendUnavailable, ConfigError, ThreadBusy, ThreadLost, shown
from orla_lg.graph.context import CONFIG_KEY
from orla_lg.graph.threads import owners
from orla_lg.graph.threads.owners import RunOwner
from orla_lg.graph.threads.tables import since_boot
from orla_lg.link.thread_leases import Busy, ThreadOwner
from orla_lg.link.whereabouts import here, is_gone

WhenBusy = Literal["fail", "wait"]
WHEN_BUSY = ("fail", "wait")

LEAST_S, MOST_S = 0.2, 86_400.0

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 0.25
"""Between two looks at a thread that another run has."""


def checked_terms(ttl_s: float, busy: str) -> None:
    """Check how long leases last and what becomes of a busy thread.

    Raises:
        ConfigError: One is wrong.
    """
    if not is_number(ttl_s) or not LEAST_S <= ttl_s <= MOST_S:
        raise ConfigError(
            f"OrlaSaver(..., thread_lease_s): give seconds from {LEAST_S:g} to {MOST_S:g}, got {shown(ttl_s)}; 30 is "
            "right where runs may be resumed half a minute after their machine died"
        )
    choice("OrlaSaver(..., busy)", busy, WHEN_BUSY)


class Want:
    """What a read of a run asks for: a thread, for a loop that begins."""

    def __init__(self, loop: Any, control: object, tenant: str | None, thread: str, deadline_s: float | None) -> None:
        self.loop, self.control, self.tenant, self.thread = loop, control, tenant, thread
        self.owner = owners.current()
        self.is_root = self.owner is None
        if self.owner is None:
            self.owner = RunOwner(owners.run_of(loop))
        self.deadline_s = deadline_s

    @property
    def says(self) -> ThreadOwner:
        """What the registry is to know of the owner."""
        assert self.owner is not None
        return ThreadOwner(self.owner.holder, here(), os.getpid(), self.owner.run)


class Patience:
    """How long a run waits for a thread, and why it ends."""

    def __init__(self, want: Want, ttl_s: float, when_busy: WhenBusy) -> None:
        self._want, self._when_busy = want, when_busy
        # An owner that has ended without a word is over within its lease: that is waited for, and a moment more.
        patience_s = ttl_s + 2 * LONGEST_PAUSE_S
        self._until_s = since_boot() + min(patience_s, want.deadline_s or patience_s)
        self.pause_s = FIRST_PAUSE_S / 1.5
        self.gone = ""

    def busy(self, busy: Busy) -> None:
        """Take in that another run has the thread.

        Raises:
            ThreadBusy: It is not waited for, or was for long enough.
        """
        if is_gone(busy.owner.host, busy.owner.pid) and self.gone != busy.owner.holder:
            self.gone, self.pause_s = busy.owner.holder, 0.0
            return
        if self._when_busy == "fail" or since_boot() >= self._until_s:
            raise busy_error(self._want.thread, busy, self._when_busy)
        self.pause_s = min(max(self.pause_s, FIRST_PAUSE_S / 1.5) * 1.5, LONGEST_PAUSE_S)

    def unavailable(self, error: BackendUnavailable) -> None:
        """Take in that there is no core just now: another one may be taking over."""
        if since_boot() >= self._until_s:
            raise error
        self.pause_s = LONGEST_PAUSE_S


def deadline_in(said: Mapping[str, Any]) -> float | None:
    """Return the deadline that a run's hints name, in its ``configurable``."""
    hints = said.get(CONFIG_KEY)
    found = hints.get("deadline_s") if isinstance(hints, Mapping) else getattr(hints, "deadline_s", None)
    return float(found) if isinstance(found, int | float) and is_number(found) and found > 0 else None


def busy_error(thread: str, busy: Busy, when_busy: WhenBusy) -> ThreadBusy:
    """Return what a run on a thread that another one has ends with."""
    owner = busy.owner
    who = _named(owner) if owner.holder else "another run"
    advice = "" if when_busy == "wait" else "; try again then, or give OrlaSaver(..., busy='wait')"
    return ThreadBusy(
        f"thread {shown(thread)} is busy: {who} owns it, for {busy.left_s:.1f} s more unless that renews its "
        f"lease{advice}", **_fields(thread, busy),
    )  # fmt: skip


def lost_error(thread: str, busy: Busy | None, ttl_s: float) -> ThreadLost:
    """Return what a late write ends with."""
    assert busy is not None
    who = f"{_named(busy.owner)} has it" if busy.owner.holder else "another run has had it since"
    return ThreadLost(
        f"thread {shown(thread)} is not this run's any more: its lease of {ttl_s:g} s ran out, and {who}; what this "
        "run would write now is refused, and the thread goes on from what the other one wrote",
        **_fields(thread, busy),
    )


def _named(owner: ThreadOwner) -> str:
    run = f"run {shown(owner.run)} in " if owner.run else ""
    return f"{run}process {owner.pid} on {owner.host.partition(' ')[0]}"


def _fields(thread: str, busy: Busy) -> dict[str, Any]:
    owner = busy.owner
    return {
        "thread": thread, "host": owner.host.partition(" ")[0], "pid": owner.pid, "run": owner.run,
        "left_s": busy.left_s,
    }  # fmt: skip
