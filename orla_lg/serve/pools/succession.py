"""How cores of one pool follow one another: a process stands by until the lease is its own, and decides from then on.

A standby has all that takes time behind it: what it imports, its backends asked what they are, its port. It asks for
the lease every ``LEASE_POLL_S`` (``LinkHost.start``), so that what a failover takes is what is left of the lease, and
the replicas' way here. On the core's own machine it sees that the core's process has ended, and gives the lease back
in its place: what has ended can grant nothing.

In the directory a standby's entry grows older unless it is written again. The core strikes out what has not been for
``SILENT_S`` by its own clock; no two machines' clocks are compared.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

from orla_lg.errors import shown
from orla_lg.link.places import CorePlace, urls_by_pool
from orla_lg.link.whereabouts import is_gone
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.pools.directory import Directory
from orla_lg.serve.store.store import StoreUnavailable

log = logging.getLogger("orla_lg")

BEAT_S = 3.0
"""How often a standby writes its entry again, and a core looks for those that did not."""

SILENT_S = 4 * BEAT_S
"""A standby that has not written for so long is no more."""

STORE_PAUSE_S = 0.2
"""Until a store that does not answer is asked again."""


class Succession:
    """The place of one process among those of its pool. Of its loop.

    Args:
        host: Takes the lease, and decides by it.
        directory: Where all cores and standbys stand.
        place: Returns where this process is reached; of its epoch, 0 for a standby.
        refresh: Reads again what is posted.
        is_meant: Whether this process was started as a standby.
    """

    def __init__(
        self,
        host: LinkHost,
        directory: Directory,
        place: Callable[[int], CorePlace],
        refresh: Callable[[], Awaitable[None]],
        *,
        is_meant: bool,
    ) -> None:
        self.cores: Mapping[str, Sequence[str]] = {}
        """By pool, the URLs of its core and then of its standbys, as they were seen last."""
        self.followers: list[Callable[[Sequence[CorePlace]], None]] = []
        """Called with what stands in the directory, whenever that was read."""
        self._host, self._directory, self._place, self._refresh = host, directory, place, refresh
        self._is_meant = is_meant
        self._core: CorePlace | None = None
        """The one that decides for this pool, as far as the directory has it."""
        self._waits = asyncio.Event()
        """It stands by: another process has the lease."""
        self._changed = asyncio.Event()
        self._complained = ""
        self._is_announced = True
        """Whether the directory has taken what it was last told of this core."""
        self._beat = 0

    @property
    def own(self) -> Sequence[str]:
        """The URLs of this pool's core, and of its standbys."""
        return self.cores.get(self._host.pool, ())

    async def run(self) -> None:
        """Stand by, take over, and keep the directory, until this is cancelled."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._follow())
            standing = tasks.create_task(self._stand_by())
            try:
                await self._take_over()
            finally:
                standing.cancel()
                if self._waits.is_set():
                    self._try(lambda: self._directory.leave(self._host.pool, self._host.lease.holder))
            await self._keep()

    async def _take_over(self) -> None:
        """Wait for the lease, and decide from then on."""
        await self._again_until_done(self._start, "this core takes no calls")
        if self._waits.is_set():
            log.warning("this core has taken over, with epoch %d", self._host.lease.epoch)
        self.announce()
        await self._again_until_done(
            self._refresh, "what is posted cannot be read"
        )  # what the core before wrote last

    async def _start(self) -> None:
        await self._refresh()
        await self._host.start(self._look)

    async def _again_until_done(self, step: Callable[[], Awaitable[None]], fault: str) -> None:
        """Do a step, and do it again as long as the store does not answer."""
        while True:
            try:
                await step()
            except StoreUnavailable as error:
                self._complain(fault, error)
                await asyncio.sleep(STORE_PAUSE_S)
            else:
                self._complained = ""
                return

    def _look(self) -> None:
        """Look after the core that has the lease; called whenever it was asked for in vain."""
        if not self._waits.is_set():
            self._another_decides()
        core = self._core
        if core is not None and core.holder and is_gone(core.host, core.pid):
            self._core = None
            log.warning("the process of the core (pid %d) has ended", core.pid)
            self._host.lease.release(core.holder)

    def _another_decides(self) -> None:
        """Say that this process waits for the lease of another one."""
        self._waits.set()
        with contextlib.suppress(StoreUnavailable):
            self._read()
        pool = f"pool {self._host.pool!r}" if self._host.pool else "this store"
        core = f" ({', '.join(map(shown, self.own))})" if self.own else ""
        said = "stands by" if self._is_meant else "waits, as `orla-lg serve --standby` does,"
        log.warning("another core%s decides for %s; this one %s and takes over at its end", core, pool, said)
        theirs, ours = () if self._core is None else self._core.backends, self._place(0).backends
        if theirs and ours and not {*theirs} & {*ours}:
            log.error(
                "that core has other backends (%s) and none of this one's (%s): if they are two installations, they "
                "need a store each, or a URL with ?prefix=NAME", _listed(theirs), _listed(ours),
            )  # fmt: skip

    # The directory

    def announce(self) -> None:
        """Write down where the core is, if this is it; once more when its backends have changed."""
        if self._host.decides:
            place = self._place(self._host.lease.epoch)
            self._is_announced = self._try(lambda: self._directory.announce(place))

    async def _stand_by(self) -> None:
        """Keep this standby's entry young."""
        await self._waits.wait()
        while True:
            self._beat += 1
            place = self._place(0)._replace(beat=self._beat)
            self._try(lambda place=place: self._directory.stand_by(place, self._host.lease.holder))  # type: ignore[misc]
            await asyncio.sleep(BEAT_S)

    async def _keep(self) -> None:
        """Strike out what does not stand by any more, and announce the core again if that failed."""
        seen: dict[str, tuple[int, float]] = {}
        while True:
            if self._host.decides:
                if not self._is_announced:
                    self.announce()
                with contextlib.suppress(StoreUnavailable):
                    seen = self._strike(seen, time.monotonic())
            await asyncio.sleep(BEAT_S)

    def _strike(self, seen: Mapping[str, tuple[int, float]], now: float) -> dict[str, tuple[int, float]]:
        """Strike out standbys whose entry is as it was for too long; returns the others, each since when it is so."""
        found: dict[str, tuple[int, float]] = {}
        for holder, (place, version) in self._directory.waiting(self._host.pool).items():
            before = seen.get(holder)
            since_s = now if before is None or before[0] != version else before[1]
            if now - since_s > SILENT_S or is_gone(place.host, place.pid):
                self._directory.strike(self._host.pool, holder, version)
            else:
                found[holder] = (version, since_s)
        return found

    async def _follow(self) -> None:
        """Tell replicas where cores and standbys are, whenever that changes."""
        loop = asyncio.get_running_loop()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(self._changed.set)

        while (end := self._watched(wake)) is None:  # noqa: ASYNC110 - the store has no event for it
            await asyncio.sleep(STORE_PAUSE_S)
        try:
            while True:
                self._changed.clear()
                try:
                    self._read()
                except StoreUnavailable:  # what changed is not announced a second time
                    await asyncio.sleep(STORE_PAUSE_S)
                else:
                    await self._changed.wait()
        finally:
            end()

    def _watched(self, wake: Callable[[], None]) -> Callable[[], None] | None:
        try:
            return self._directory.watch(wake)
        except StoreUnavailable:
            return None

    def _read(self) -> None:
        places = self._directory.places()
        self._core = next((each for each in places if each.epoch and each.pool == self._host.pool), None)
        for follower in self.followers:
            follower(places)
        cores = urls_by_pool(places)
        if cores != self.cores:
            self.cores = self._host.cores = cores
            if self._host.decides:
                self._host.refresh()

    # A store that does not answer

    def _try(self, write: Callable[[], object]) -> bool:
        """Write to the directory, if the store answers: it is a hint, and written again. Returns whether it did."""
        try:
            write()
        except StoreUnavailable as error:
            self._complain("the directory of cores cannot be written", error)
            return False
        return True

    def _complain(self, what: str, error: StoreUnavailable) -> None:
        if what != self._complained:
            self._complained = what
            log.error("%s: %s", what, error)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(shown, names[:5])) + (", …" if len(names) > 5 else "")
