"""The threads that runs of this process hold: taken at a run's first read, renewed, compared at writes, given back.

A lease is renewed in the background, by one thread for all. A write of a run whose lease another run has is refused
(``ThreadLost``). Where the saver's writes compare the owner in their own transaction, no late write can slip in; else
it is looked up before the write, if the lease was not renewed within half its time, and what remains is a process
that is frozen between that and the write, for longer than its lease.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

from orla_lg.core.steps import Sleep, Steps, adrive, drive
from orla_lg.errors import BackendUnavailable, shown
from orla_lg.graph.context import CONFIG_KEY, tenant_in
from orla_lg.graph.threads import owners
from orla_lg.graph.threads.owners import RunOwner, Use
from orla_lg.graph.threads.registries import LeaseRegistry, WriteRefused
from orla_lg.graph.threads.steps import SaverCall
from orla_lg.graph.threads.tables import since_boot
from orla_lg.graph.threads.waiting import (
    LONGEST_PAUSE_S,
    Patience,
    Want,
    WhenBusy,
    busy_error,
    deadline_in,
    lost_error,
)
from orla_lg.link.thread_leases import Busy, Taken, ThreadOwner
from orla_lg.link.whereabouts import here

log = logging.getLogger("orla_lg")

IDLE_S = 30.0
"""The thread that renews ends after so long without a lease."""


class HeldThread:
    """A thread that a run holds. Changed under the lock of its ``ThreadLeases``."""

    def __init__(self, tenant: str | None, thread: str, owner: RunOwner, epoch: int, until_s: float) -> None:
        self.tenant, self.thread, self.owner, self.epoch = tenant, thread, owner, epoch
        self.until_s = until_s
        """Until then nothing needs to be looked up before a write, by ``since_boot``."""
        self.renew_at_s = 0.0
        self.controls: list[object] = []
        """What its run's configurations carry (``owners.control_of``)."""
        self.uses = set[Use]()
        self.lost: Busy | None = None
        """Which run has the thread now."""

    @property
    def says(self) -> ThreadOwner:
        """What the registry knows of the owner."""
        return ThreadOwner(self.owner.holder, here(), os.getpid(), self.owner.run)


class ThreadLeases:
    """The threads that runs of one saver hold in this process.

    Args:
        registry: Where the leases are kept.
        ttl_s: How long one lasts that is not renewed.
        busy: What becomes of a run on a thread that another one has.
        tenant: Of the saver.

    Raises:
        ConfigError: An argument is wrong.
    """

    def __init__(
        self, registry: LeaseRegistry, ttl_s: float, busy: WhenBusy = "fail", tenant: str | None = None
    ) -> None:
        self.registry, self.ttl_s, self.busy, self.tenant = registry, float(ttl_s), busy, tenant
        self._complained = False
        self._begin()
        _all.add(self)

    def _begin(self) -> None:
        self._lock = threading.Condition()
        self._held: dict[str, list[HeldThread]] = {}
        self._dropped = deque[Use]()
        """Appended to by finalizers, which take no lock."""
        self._renewing: threading.Thread | None = None

    def forked(self) -> None:
        """Hold nothing, in a child: the threads are its parent's."""
        self._begin()
        self.registry.forked()

    # Reads

    def read(self, config: Mapping[str, Any]) -> Steps:
        """Take the thread for the run that reads with *config*, and wait for it where that is wanted.

        Raises:
            ThreadBusy: Another run has it.
            ThreadLost: This run had it before.
        """
        yield from self._settle()
        want = self._wanted(config)
        if want is None:
            return
        patience = Patience(want, self.ttl_s, self.busy)
        while True:
            asked_s = since_boot()
            try:
                answer = yield from self.registry.take(want.tenant, want.thread, want.says, self.ttl_s, patience.gone)
            except BackendUnavailable as error:
                patience.unavailable(error)
            except (asyncio.CancelledError, KeyboardInterrupt):  # it may be taken: it is given back with its loop
                self._took(want, Taken(0), asked_s)
                raise
            else:
                if isinstance(answer, Taken):
                    self._took(want, answer, asked_s)
                    return
                patience.busy(answer)
            yield Sleep(patience.pause_s)

    def _wanted(self, config: Mapping[str, Any]) -> Want | None:
        """Return what has to be taken; ``None`` for a viewer's read, and where the run has the thread already."""
        control, said = owners.control_of(config), config.get("configurable") or {}
        if control is None or said.get("thread_id") is None or (loop := owners.beginning_loop()) is None:
            return None
        thread = str(said["thread_id"])
        owner = owners.current()
        with self._lock:
            for held in self._held.get(thread, ()):
                if held.owner is owner or any(each is control for each in held.controls):
                    if held.lost is not None:
                        raise lost_error(held.thread, held.lost, self.ttl_s)
                    self._used(held, loop, control)
                    return None
        tenant = tenant_in(said.get(CONFIG_KEY))
        return Want(loop, control, self.tenant if tenant is None else tenant, thread, deadline_in(said))

    def _took(self, want: Want, taken: Taken, asked_s: float) -> None:
        assert want.owner is not None
        held = HeldThread(want.tenant, want.thread, want.owner, taken.epoch, asked_s + self.ttl_s / 2)
        held.renew_at_s = asked_s + self.ttl_s / 3
        with self._lock:
            self._held.setdefault(want.thread, []).append(held)
            self._used(held, want.loop, want.control, is_root=want.is_root)
            if self._renewing is None or not self._renewing.is_alive():
                self._renewing = threading.Thread(
                    target=_renews, args=(weakref.ref(self), self._lock), name="orla-thread-leases", daemon=True
                )
                self._renewing.start()
            self._lock.notify()
        if want.is_root:
            owners.CURRENT.set(want.owner)

    def _used(self, held: HeldThread, loop: Any, control: object, *, is_root: bool = False) -> None:
        use = Use(held, loop, self._drop)
        use.is_root = is_root
        held.uses.add(use)
        if not any(each is control for each in held.controls):
            held.controls.append(control)
        if isinstance(loop.stack, AsyncExitStack):
            loop.stack.push_async_callback(adrive, self._ended(use))
        else:
            loop.stack.callback(drive, self._ended(use))

    # The end of a run

    def _over(self, use: Use) -> HeldThread | None:
        """Take a use away; returns what is to be given back with it."""
        use.closed()
        held: HeldThread = use.held
        with self._lock:
            if use not in held.uses:
                return None
            held.uses.discard(use)
            if held.uses:
                return None
            here = self._held.get(held.thread, [])
            if held in here:
                here.remove(held)
            if not here:
                self._held.pop(held.thread, None)
            return held if held.lost is None else None

    def _ended(self, use: Use) -> Steps:
        if (held := self._over(use)) is not None:
            with _logged(held.thread, "given back"):
                yield from self.registry.give_back(held.tenant, held.thread, held.says)

    def _drop(self, use: Use) -> None:
        self._dropped.append(use)

    def _settle(self) -> Steps:
        with contextlib.suppress(IndexError):
            while True:
                yield from self._ended(self._dropped.popleft())

    # Writes

    def write(self, inner: Any, name: str, args: Any, kwargs: Any) -> Steps:
        """Write by the method *name* of *inner*, if the thread is this run's, or no other run's.

        Raises:
            ThreadLost: It is not this run's any more.
            ThreadBusy: No run writes, and one has it.
        """
        config = args[0] if args else kwargs["config"]
        held, thread = self._holder(config), _thread_of(config)
        if self.registry.compares:
            with self._compared(held, thread):
                fenced = yield from self.registry.fenced(inner, thread, "" if held is None else held.owner.holder)
                return (yield SaverCall(getattr(fenced, name), args, kwargs))
        call = SaverCall(getattr(inner, name), args, kwargs)
        if held is None:
            return (yield from self._alone(config, call))
        if since_boot() >= held.until_s and isinstance((yield from self._asked(held)), Busy):
            raise lost_error(thread, held.lost, self.ttl_s)
        return (yield call)

    def _holder(self, config: Mapping[str, Any]) -> HeldThread | None:
        """Return the thread as the writing run holds it; ``None``: no run writes."""
        control, owner = owners.control_of(config), owners.current()
        with self._lock:
            for held in self._held.get(_thread_of(config), ()):
                is_its = held.owner is owner if control is None else any(each is control for each in held.controls)
                if is_its:
                    if held.lost is not None:
                        raise lost_error(held.thread, held.lost, self.ttl_s)
                    return held
        return None

    @contextlib.contextmanager
    def _compared(self, held: HeldThread | None, thread: str) -> Iterator[None]:
        try:
            yield
        except WriteRefused as refused:
            if held is None:
                raise busy_error(thread, refused.busy, self.busy) from None
            held.lost = refused.busy
            raise lost_error(held.thread, held.lost, self.ttl_s) from None

    def _alone(self, config: Mapping[str, Any], call: SaverCall) -> Steps:
        """Hold the thread for one write that is no run's (``update_state``): what it read must be what is there."""
        tenant = tenant_in((config.get("configurable") or {}).get(CONFIG_KEY))
        thread = _thread_of(config)
        lease = (
            self.tenant if tenant is None else tenant, thread,
            ThreadOwner(RunOwner("").holder, here(), os.getpid(), ""),
        )  # fmt: skip
        try:
            answer = yield from self.registry.take(*lease, self.ttl_s, "")
            if isinstance(answer, Busy):
                raise busy_error(thread, answer, self.busy)
            return (yield call)
        finally:  # also of a take that was cut off; and what is written is written, whatever becomes of this
            with _logged(thread, "given back"):
                yield from self.registry.give_back(*lease)

    # Renewal

    def _asked(self, held: HeldThread) -> Steps:
        """Look up whether a thread is still its run's, for as long as the registry may be away."""
        until_s = since_boot() + self.ttl_s
        while True:
            with contextlib.suppress(BackendUnavailable):
                return (yield from self._renew(held))
            if since_boot() >= until_s:
                return (yield from self._renew(held))
            yield Sleep(LONGEST_PAUSE_S)

    def _renew(self, held: HeldThread) -> Steps:
        asked_s = since_boot()
        answer = yield from self.registry.renew(held.tenant, held.thread, held.says, self.ttl_s, held.epoch)
        if isinstance(answer, Busy):
            held.lost = answer
        else:
            held.until_s, held.renew_at_s = asked_s + self.ttl_s / 2, asked_s + self.ttl_s / 3
        return answer

    def look(self) -> float | None:
        """Renew what is due, and give back what was left; returns seconds until the next, ``None`` for none."""
        drive(self._settle())
        now = since_boot()
        with self._lock:
            held = [each for several in self._held.values() for each in several if each.lost is None]
        for each in held:
            if now >= each.renew_at_s:
                self._renew_aside(each)
        return None if not held else max(0.0, min(each.renew_at_s for each in held) - since_boot())

    def _renew_aside(self, held: HeldThread) -> None:
        try:
            answer = drive(self._renew(held))
            self._complained = False
        except Exception as error:  # noqa: BLE001 - a database's own; the lease runs out, and a write asks again
            held.renew_at_s = since_boot() + min(1.0, self.ttl_s / 6)
            if not self._complained:
                self._complained = True
                log.warning("the lease on thread %s cannot be renewed: %s", shown(held.thread), error)
            return
        if isinstance(answer, Busy) and held.uses:
            log.warning("%s", lost_error(held.thread, held.lost, self.ttl_s))


def _renews(leases_of: Callable[[], ThreadLeases | None], changed: threading.Condition) -> None:
    """Renew for as long as something is held; *leases_of* is weak, so that what is dropped ends."""
    idle_since_s: float | None = None
    while (leases := leases_of()) is not None and leases._lock is changed:
        left_s = leases.look()
        if left_s is None:
            idle_since_s = since_boot() if idle_since_s is None else idle_since_s
            if since_boot() - idle_since_s > IDLE_S:
                with changed:
                    if not leases._held:
                        leases._renewing = None
                        return
        else:
            idle_since_s = None
        del leases
        with changed:
            changed.wait(min(1.0 if left_s is None else left_s, 1.0))


@contextlib.contextmanager
def _logged(thread: str, what: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a closed connection's own, or no core: the lease runs out
        log.warning("the lease on thread %s was not %s and runs out by itself: %s", shown(thread), what, error)


def _thread_of(config: Mapping[str, Any]) -> str:
    return str((config.get("configurable") or {}).get("thread_id"))


_all: weakref.WeakSet[ThreadLeases] = weakref.WeakSet()


def _after_fork() -> None:
    owners.UNFINISHED.clear()
    for leases in list(_all):
        leases.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
