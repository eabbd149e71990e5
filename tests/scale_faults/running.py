"""The run: kinds of faults over several sites at once, each in a thread that makes one kind after the other.

What goes wrong in one kind is in its row, and the site is replaced by a fresh one: a long run keeps what it found.
"""

from __future__ import annotations

import contextlib
import threading
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import ExitStack
from dataclasses import dataclass
from random import Random

from tests.scale_faults.account import Row
from tests.scale_faults.kinds import Kind
from tests.scale_faults.processes import OVER
from tests.scale_faults.site import BOUNDS, Site, Watch

MOST_STALLS = 3
"""After so many of one kind the rest of it is left out."""
STOP_S = 30.0
"""How long a thread may take to end its site when the run is stopped."""


@dataclass(frozen=True)
class Work:
    """One kind of fault, to be made some times; a control until it breaks a bound, so often at most."""

    name: str
    kind: Kind
    times: int
    seed: str = ""
    is_control: bool = False

    @property
    def lasts_s(self) -> float:
        """About how long it takes; what takes longest goes first, so that the sites end together."""
        return self.times * (10.0 + 1.5 * self.kind.long_s)


def held(row: Row) -> bool:
    """Whether no bound was broken."""
    return all(row.most.get(name, 0) <= bound for name, bound in BOUNDS.items())


@dataclass(frozen=True)
class Found:
    """What came of one kind."""

    work: Work
    row: Row

    def wrong(self) -> list[str]:
        """Return what must not be."""
        if not self.work.is_control:
            return self.row.wrong(BOUNDS)
        vain = [f"{self.work.name}: the bound held, so the other runs prove nothing"] if held(self.row) else []
        return [*self.row.stalled(), *vain]


class Run:
    """All of it.

    Args:
        works: What to make.
        sites: How many at once.
        opened: Makes a site; it is entered here. It is given the site's number, and which one of that number it is.
        made: Called when a fault was made; in any thread.
        came: Called with what came of each kind, one at a time.
    """

    def __init__(
        self,
        works: Sequence[Work],
        sites: int,
        opened: Callable[[int, int], Site],
        made: Callable[[], None] = lambda: None,
        came: Callable[[Found], None] = lambda found: None,
    ) -> None:
        self.found: dict[str, Found] = {}
        self._left = sorted(works, key=lambda work: -work.lasts_s)
        self._opened, self._made, self._came = opened, made, came
        self._lock = threading.Lock()
        self._many = min(sites, len(self._left))

    def run(self) -> bool:
        """Make all faults; returns whether none was left out because the run was stopped."""
        ends = [
            Future[None]() for _ in range(self._many)
        ]  # a thread whose ``join`` was interrupted seems to have ended
        try:
            for number, end in enumerate(ends):
                threading.Thread(target=self._work, args=(number, end), daemon=True).start()
            while wait(ends, 0.1).not_done:
                pass
        except KeyboardInterrupt:
            OVER.set()
            wait(ends, STOP_S)
        return not OVER.is_set()

    def _next(self) -> Work | None:
        with self._lock:
            return self._left.pop(0) if self._left and not OVER.is_set() else None

    def _work(self, number: int, end: Future[None]) -> None:
        seat = Seat(number, self._opened)
        try:
            while (work := self._next()) is not None:
                found = Found(work, self._row(seat, work))
                with self._lock:
                    self.found[work.name] = found
                    self._came(found)
            seat.end()
        except KeyboardInterrupt:
            pass
        finally:
            seat.close()
            end.set_result(None)

    def _row(self, seat: Seat, work: Work) -> Row:
        """Make a kind of fault as often as it is to be made, on fresh sites where one stalls."""
        row, dice = Row(work.name, may_end_with=work.kind.may_end_with), Random(f"{work.name}{work.seed}")
        while row.faults < work.times and len(row.stalls) < MOST_STALLS:
            if work.is_control and not held(row):
                break
            watch, part, times = None, Row(work.name), 1 if work.is_control else work.times - row.faults
            try:
                site = seat.site()
                site.cores_are(apart=work.kind.apart)
                site.gateways_are(there=work.kind.gateways)
                site.calls_take(work.kind.long_s)
                watch = Watch(site, work.name)
                part = watch.row
                while part.faults < times:
                    watch.fault(work.kind.make, dice)
                    self._made()
                watch.end()
            except Exception as fault:  # whatever it is, the run goes on
                told = str(fault) if isinstance(fault, AssertionError) else ""
                if watch is not None:
                    with contextlib.suppress(Exception):
                        watch.note()
                part.stalls.append(f"in fault {row.faults + part.faults}: {told or traceback.format_exc()}")
                seat.close()
            row.add(part)
        return row


class Seat:
    """The place of a site: it has one from when it is asked for, and a fresh one after ``close``."""

    def __init__(self, number: int, opened: Callable[[int, int], Site]) -> None:
        self._number, self._opened, self._times = number, opened, 0
        self._stack = ExitStack()
        self._site: Site | None = None

    def site(self) -> Site:
        """Return the site, which stands."""
        if self._site is None:
            self._times += 1
            self._site = self._stack.enter_context(self._opened(self._number, self._times))
        return self._site

    def end(self) -> None:
        """Let what is under way end."""
        if self._site is not None:
            self._site.end()

    def close(self) -> None:
        """End the site. Idempotent."""
        self._site = None
        self._stack.close()
