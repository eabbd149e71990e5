"""Sessions: workflows of the gateway's callers, which say when they begin and never when they end.

A run is open for a session while its calls come, and ends when it had none for a while: so it is a thread between two
runs, and what memory policies keep for threads they keep for it. All of it is the event loop's, so there is no lock.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from dataclasses import dataclass

from orla_lg.core.serving import Serving
from orla_lg.core.workflow import Outcome

LATE = 20
"""A session is idle late by a part of its time, one so-manieth at most; so many sessions end in one go."""


@dataclass(eq=False, slots=True)
class CallerSession:
    """One session that had calls lately."""

    name: str
    tenant: str | None
    run: str
    used_s: float
    """When its newest call came or ended."""
    calls: int = 0
    """Calls of it that have not ended."""
    final: bool = False
    """It is over with the last of its calls, and nothing is kept for it."""
    flushes: bool = True
    """Whether nothing is kept for it when its caller says that it is complete."""


class SessionBook:
    """The sessions that had calls lately; the longest without any stand first.

    Args:
        serving: The core.
        idle_s: After so long without calls a session is idle.
        most: So many are followed.
    """

    def __init__(self, serving: Serving, idle_s: float, most: int) -> None:
        self._serving = serving
        self._idle_s = idle_s
        self._most = most
        self._open: OrderedDict[tuple[str | None, str], CallerSession] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._open)

    def enter(self, name: str, tenant: str | None) -> CallerSession | None:
        """Note a call of a session; ``None`` where as many as may be followed have calls under way."""
        key, now = (tenant, name), self._serving.clock()
        session = self._open.get(key)
        if session is None:
            if len(self._open) >= self._most and not self._make_room():
                return None
            run = f"session-{self._serving.new_id()}"
            self._serving.progress.run_started(run, thread=name, tenant=tenant, graph="gateway")
            session = self._open[key] = CallerSession(name, tenant, run, now)
            if self._timer is None:
                self._sweep_in(self._idle_s)
        else:
            session.used_s = now
            self._open.move_to_end(key)
        session.calls += 1
        return session

    def leave(self, session: CallerSession) -> None:
        """Note that a call of a session ended."""
        session.calls -= 1
        session.used_s = self._serving.clock()
        key = (session.tenant, session.name)
        if self._open.get(key) is not session:
            return
        if session.final and not session.calls:
            self._complete(key)
        else:
            self._open.move_to_end(key)

    def complete(self, name: str, tenant: str | None) -> None:
        """End a session whose caller says that it is complete, with the last of its calls."""
        session = self._open.get((tenant, name))
        if session is None:
            self._serving.progress.thread_deleted(name, tenant)
        elif session.calls:
            session.final = True
        else:
            self._complete((tenant, name))

    def _complete(self, key: tuple[str | None, str]) -> None:
        session = self._open[key]
        self._end(key)
        if session.flushes:
            self._serving.progress.thread_deleted(session.name, session.tenant)

    def close(self) -> None:
        """End all sessions."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for key in list(self._open):
            self._end(key)

    def _make_room(self) -> bool:
        free = next((key for key, session in self._open.items() if not session.calls), None)
        if free is not None:
            self._end(free)
        return free is not None

    def _end(self, key: tuple[str | None, str]) -> None:
        session = self._open.pop(key)
        self._serving.progress.run_ended(session.run, Outcome.DONE)

    def _sweep_in(self, seconds: float) -> None:
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(max(seconds, self._idle_s / LATE), self._sweep)

    def _sweep(self) -> None:
        """End what is idle, and look again when the next one may be."""
        self._timer = None
        now, next_s, idle = self._serving.clock(), self._idle_s, []
        for key, session in self._open.items():
            if (left_s := session.used_s + self._idle_s - now) > 0:
                next_s = left_s
                break
            if not session.calls:
                idle.append(key)
        for key in idle:
            self._end(key)
        if self._open:
            self._sweep_in(next_s)
