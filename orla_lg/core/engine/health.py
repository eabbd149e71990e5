"""The health of one backend's engine: its last probe, whether it answers, whether calls may try it.

Part of the backend's scheduler and under its lock. It starts no I/O by itself except on the background loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
from collections.abc import Iterator
from concurrent.futures import CancelledError, Future
from typing import Protocol

from orla_lg.core.background import Background, Clock
from orla_lg.core.call import Call
from orla_lg.core.engine.backend import Backend, BackendAdapter, Capability, Probe
from orla_lg.core.engine.breaker import Breaker, Circuit
from orla_lg.errors import BackendUnavailable, OrlaClosed

log = logging.getLogger("orla_lg")

PROBE_PAUSE_S = 0.5
"""An engine that does not answer is asked again at most this often."""

PROBE_INTEREST_S = 60.0
"""So long after the last call for it, a silent engine is asked again without a new call."""

PROBE_AGAIN_S = 30.0
"""An engine is probed again after this time: it may have been restarted with other flags."""

RETURN_AGAIN_S = 1.0
"""The same when a workflow returns to an engine that reports restarts: it may have been restarted meanwhile, and what
is not there any more can be brought back before it is needed."""

SILENT_S = 300.0
"""An engine that was not asked for so long may have been restarted unnoticed: calls wait for its answer, if it
reports restarts, because what is believed of its cache would be wrong."""

PROBE_LIMIT_S = 40.0
"""A probe that takes longer has failed, whatever the adapter waits for."""


class HealthListener(Protocol):
    """Acts on changes of an engine; the first two are called under the lock, the last is not."""

    def learned(self, probe: Probe) -> None:
        """Take in a probe."""
        ...

    def forgotten(self) -> None:
        """Believe no more that the engine holds anything."""
        ...

    def go_on(self) -> None:
        """Grant the calls that may go now."""
        ...


class Health:
    """Probe and circuit of one backend."""

    def __init__(
        self,
        backend: Backend,
        adapter: BackendAdapter,
        background: Background,
        clock: Clock,
        lock: threading.Lock,
        concerned: HealthListener,
    ) -> None:
        self.backend = backend
        self.adapter = adapter
        self.lock = lock
        self.breaker = Breaker()
        self.probe: Probe | None = None
        self.fault: BackendUnavailable | None = None
        self._concerned = concerned
        self._background = background
        self._clock = clock
        self._probing: Future[None] | None = None
        self._returned_to: Future[None] | None = None
        """The probe under way that a workflow's return asked for."""
        self._trial: Future[None] | None = None
        self.at_trial: dict[str, Call] = {}
        """By id, the calls that wait while another one tries the engine."""
        self._probed_s = float("-inf")
        self._wanted_s = float("-inf")
        self._learned_s = float("-inf")

    # What the engine is

    @property
    def known(self) -> bool:
        """Whether the engine answered when it was last asked."""
        return self.probe is not None and self.fault is None

    def connect(self) -> Future[None] | None:
        """Start probing the engine if it is not known; returns a future for the end of the probe under way.

        An engine that is known is probed again from time to time, and no call waits for that unless the last probe
        is long ago, or a workflow returns.

        That future only ever ends well, and only when what was learned is in place. One waiter's cancellation
        does not reach it, so the others wait on.
        """
        now = self._wanted_s = self._clock()
        probe, awaited = self.probe, self._returned_to
        if probe is None or self.fault is not None or (probe.incarnation and now - self._learned_s > SILENT_S):
            return self._probe_once(now)
        if now >= self._probed_s + PROBE_AGAIN_S:
            self._probe_once(now)
            awaited = self._returned_to
        return None if awaited is None or awaited.done() else awaited

    def ask_for_return(self, *, idle: bool) -> None:
        """Ask an engine that reports restarts whether there was one, sooner than usual.

        Calls wait for the answer of one that is *idle*, as it comes at once.
        """
        if self.probe is not None and self.probe.incarnation:
            with contextlib.suppress(OrlaClosed):
                asked = self._probe_once(self._clock(), RETURN_AGAIN_S)
                self._returned_to = asked if idle else None

    @property
    def asked_for_s(self) -> float:
        """Seconds since it was last asked."""
        return self._clock() - self._probed_s

    def ask_again(self) -> Future[None] | None:
        """Start probing the engine unless it was asked just now; returns a future for the end of that probe."""
        return self._probe_once(self._clock(), RETURN_AGAIN_S)

    @property
    def asking(self) -> bool:
        """Whether a probe is under way."""
        return self._probing is not None

    def _is_due(self, now: float, again_s: float = PROBE_AGAIN_S) -> bool:
        return now >= self._probed_s + (again_s if self.known else PROBE_PAUSE_S)

    def _probe_once(self, now: float, again_s: float = PROBE_AGAIN_S) -> Future[None] | None:
        with self.lock:
            if self._probing is not None or not self._is_due(now, again_s):
                return self._probing
            self._probed_s = now
            asked = self._background.submit(self._ask())
            ended: Future[None] = Future()
            self._probing = ended
            ended.set_running_or_notify_cancel()
        asked.add_done_callback(self._probed)  # not under the lock: a probe that has ended calls back at once
        return ended

    async def _ask(self) -> Probe:
        async with asyncio.timeout(PROBE_LIMIT_S):
            return await self.adapter.probe()

    def _probed(self, asked: Future[Probe]) -> None:
        error = CancelledError() if asked.cancelled() else asked.exception()
        with self.lock:
            ended, self._probing = self._probing, None
            if error is None:
                self._learn(asked.result())
            elif isinstance(error, BackendUnavailable):
                self.fault = error
            else:
                self.fault = BackendUnavailable(f"probing backend {self.backend.name!r} failed: {error!r}")
            if self.fault is not None and self._clock() - self._wanted_s < PROBE_INTEREST_S:
                self._background.call_later(PROBE_PAUSE_S, self._probe_again)
        self._concerned.go_on()
        if ended is not None:  # else ``close`` ended the wait
            ended.set_result(None)
        if not isinstance(error, BackendUnavailable | CancelledError | TimeoutError | None):
            log.error("probing backend %r failed", self.backend.name, exc_info=error)

    def _probe_again(self) -> None:
        if self.fault is not None:
            with contextlib.suppress(OrlaClosed):
                self._probe_once(self._clock())

    def close(self) -> None:
        """End the waits of calls for the probe under way."""
        with self.lock:
            ended, self._probing = self._probing, None
        if ended is not None:
            ended.set_result(None)

    def _learn(self, probe: Probe) -> None:
        if self.probe is not None and probe.incarnation != self.probe.incarnation:
            self._concerned.forgotten()
        if self.fault is not None:  # it was gone and is back: as good a sign as a trial call
            self._close_circuit()
        self.probe, self.fault, self._learned_s = probe, None, self._clock()
        self._concerned.learned(probe)

    def follow(self, probe: Probe | None, fault: BackendUnavailable | None) -> None:
        """Take in what another core learned of the engine just now, which spares a probe from here."""
        with self.lock:
            if probe is not None and (fault is None or self.probe is None):
                self._probed_s = self._learned_s = self._clock()
                if probe != self.probe:
                    self.probe = probe
                    self._concerned.learned(probe)
            self.fault = fault

    # Whether it is well

    def lost(self, fault: BackendUnavailable) -> None:
        """Note that no engine answered: what it held may be gone, and it must be probed again.

        Its last probe is kept until the next one. If it has an incarnation, the next one decides whether the cache
        is gone; else we believe nothing any more.
        """
        with self.lock:
            self.fault = fault
            if self.probe is None or not self.probe.incarnation:
                self._concerned.forgotten()
        self._background.call_later(PROBE_PAUSE_S, self._probe_again)

    def failed(self, fault: BackendUnavailable, *, unreachable: bool) -> None:
        """Note that an attempt failed through the engine's fault."""
        with self.lock:
            was_closed = self.breaker.opened_s is None
            if self.breaker.failed(self._clock(), str(fault), unreachable=unreachable):
                message = "backend %r: circuit open after %d failures in a row, the last: %s"
                level = logging.WARNING if was_closed else logging.DEBUG  # an outage is logged once
                log.log(level, message, self.backend.name, self.breaker.failures, fault)
                self._end_trial()
        if unreachable:
            self.lost(fault)

    def answered(self) -> None:
        """Note a sign of life."""
        if self.breaker.failures:
            with self.lock:
                self._close_circuit()

    def doubt(self, fault: str) -> None:
        """Note that the engine is not what its probe says (a model is gone): it is probed again."""
        served = ", ".join(self.probe.models) if self.probe and self.probe.models else "models it does not list"
        log.warning("backend %r at %s does not know the model or the path (it served %s): %s",
                    self.backend.name, self.backend.url, served, fault)  # fmt: skip
        self._probed_s = float("-inf")
        self.connect()

    def doubt_contents(self) -> None:
        """Note that the engine holds far less than it should: it may have been restarted unnoticed.

        If its probe has an incarnation it is asked at once; else we believe nothing any more, as when it was lost.
        """
        with self.lock:
            tells = self.probe is not None and self.probe.incarnation != ""
            if not tells:
                self._concerned.forgotten()
        if tells:
            with contextlib.suppress(OrlaClosed):
                self._probe_once(self._clock(), 0.0)

    def admit(self) -> Future[None] | None:
        """Let a call go (``None``), or return what to wait for while another call tries the engine.

        Raises:
            BackendUnavailable: The circuit is open.
        """
        if not self.breaker.failures:
            return None
        with self.lock:
            now = self._clock()
            if self.breaker.admit(now):
                return None
            if self.breaker.state(now) is Circuit.OPEN:
                raise BackendUnavailable(
                    f"the circuit of backend {self.backend.name!r} is open for another "
                    f"{self.breaker.retry_at_s - now:.1f} s after {self.breaker.failures} failures in a row, "
                    f"the last: {self.breaker.reason}"
                )
            if self._trial is None:
                self._trial = Future()
                self._trial.set_running_or_notify_cancel()  # one waiter's cancellation is not the others'
            return self._trial

    @contextlib.contextmanager
    def at_circuit(self, call: Call) -> Iterator[None]:
        """Show *call* among those that wait, while another one tries the engine."""
        self.at_trial[call.id] = call
        try:
            yield
        finally:
            self.at_trial.pop(call.id, None)

    def can(self, capability: Capability) -> bool:
        """Whether the engine answers and has a capability, by its probe or by default."""
        return self.fault is None and self.probe is not None and self.probe.can(capability)

    def offers(self, capability: Capability) -> bool:
        """Whether the engine answers and its probe names a capability."""
        support = None if self.probe is None or self.fault is not None else self.probe.capabilities.get(capability)
        return support is not None and support.usable

    def state(self) -> Circuit:
        """Return how the circuit stands now."""
        return self.breaker.state(self._clock())

    @property
    def reachable(self) -> bool | None:
        """Whether it answers; ``None`` before the first probe ended."""
        return False if self.fault else True if self.probe else None

    def _close_circuit(self) -> None:
        if self.breaker.succeeded():
            log.warning("backend %r: circuit closed, it answers again", self.backend.name)
        self._end_trial()

    def _end_trial(self) -> None:
        trial, self._trial = self._trial, None
        if trial is not None:
            # Its waiters only wake up and ask again; none of them runs in here.
            self._background.call_later(0.0, lambda: trial.set_result(None))
