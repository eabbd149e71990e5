"""The calls of one replica that the core knows of: they wait for its word, or hold a grant.

What a call is changes under the link's lock, together with the message that says so; so an opening, which is said
under that lock, leaves nothing out and nothing is said twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping

from orla_lg.core.lifecycle import CLOSED
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import OrlaClosed, shown
from orla_lg.link.call import CallCore, CallPhase, LinkedCall
from orla_lg.link.connection import Link
from orla_lg.link.contexts import LeftContexts
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import End, Grant, Message, Missed, Refused

LETS_GO_S = 5.0
"""An engine has noticed so long after a hang-up that its request is gone."""

AT_ENGINE = (CallPhase.GRANTED, CallPhase.HUNG_UP)
"""A call's request may be at its engine, by a grant."""

MOST_UNSAID = 10_000
"""Ends of calls that the core is not known to know; of more the oldest are dropped, and end there by their lease."""


class ReplicaCalls:
    """The calls of one replica, in the order of their arrival.

    Args:
        link: To the core.
        schedulers: Of the backends that can be reached from here.
    """

    def __init__(self, link: Link, schedulers: Mapping[str, BackendScheduler]) -> None:
        self._link, self._schedulers = link, schedulers
        self._calls: dict[str, LinkedCall] = {}
        self._closing = False
        self._contexts = LeftContexts()
        self._unconfirmed: deque[tuple[int, End]] = deque(maxlen=MOST_UNSAID)
        """Ends that were sent, each with the number of the ``Renew`` after it."""
        self._unsent: deque[tuple[LinkedCall, End]] = deque(maxlen=MOST_UNSAID)
        """Those of calls that held a grant, while there was no core."""
        self._hung_up: deque[tuple[float, LinkedCall, End]] = deque()
        """Those of calls whose requests were ended here: until then an engine may be busy with them."""

    def __len__(self) -> int:
        return len(self._calls)

    def check_integrity(self, core: CallCore) -> None:
        """Assert that each is in the pool of *core*, and neither new nor over; under the link's lock."""
        for call in self._calls.values():
            assert call.core is core and call.phase not in (CallPhase.NEW, CallPhase.OVER), call.call.id

    # What happens to them here

    def enter(self, call: LinkedCall) -> bool:
        """Tell the core of a call, which waits for its answer from then on; returns whether there is a core.

        Raises:
            OrlaClosed: This ``Orla`` was closed.
            LinkBroken: It is too large to be told, or of what cannot be said.
        """
        entering = call.entering()
        with self._link.lock:
            if self._closing:
                raise OrlaClosed(CLOSED)
            call.phase = CallPhase.WAITING
            self._calls[call.call.id] = call
            try:
                return self._link.send(entering)
            except LinkBroken:
                call.phase = CallPhase.NEW
                del self._calls[call.call.id]
                raise

    def missed(self, call: LinkedCall, report: Missed) -> bool:
        """Tell the core that an attempt failed; the call waits for what comes of it. Returns whether there is one.

        Raises:
            OrlaClosed: This ``Orla`` was closed: nothing will come of it.
        """
        with self._link.lock:
            if self._closing:
                raise OrlaClosed(CLOSED)
            call.phase = CallPhase.MISSED
            return self._link.send(report)

    def ended(self, call: LinkedCall, end: End) -> None:
        """Tell the core that a call is over; of a request that was hung up here only once its engine has let go."""
        with self._link.lock:
            if call.call.id not in self._calls:
                return
            if call.cut and call.phase is CallPhase.GRANTED:
                call.phase = CallPhase.HUNG_UP
                self._hung_up.append((time.monotonic() + LETS_GO_S, call, end))
            else:
                self._over(call, end)

    def let_go(self) -> None:
        """End the calls whose requests were hung up so long ago that no engine is busy with them any more."""
        with self._link.lock:
            while self._hung_up and self._hung_up[0][0] <= time.monotonic():
                _, call, end = self._hung_up.popleft()
                self._over(call, end)

    def _over(self, call: LinkedCall, end: End) -> None:
        del self._calls[call.call.id]
        phase, call.phase = call.phase, CallPhase.OVER
        self._contexts.ended(call, end)
        if self._link.send(end):
            self._unconfirmed.append((self._link.number, end))
        elif phase in AT_ENGINE:
            self._unsent.append((call, end))

    def leave(self, call: LinkedCall) -> bool:
        """Let a call that waits go on without the core, unless there is one again; returns whether it may."""
        with self._link.lock:
            if self._link.up or call.phase not in (CallPhase.WAITING, CallPhase.MISSED):
                return False
            del self._calls[call.call.id]
            call.phase, call.alone = CallPhase.OVER, True
            return True

    def waiting(self) -> list[LinkedCall]:
        """Return those that wait for the core's word."""
        with self._link.lock:
            return [call for call in self._calls.values() if call.phase in (CallPhase.WAITING, CallPhase.MISSED)]

    def granted(self) -> list[LinkedCall]:
        """Return those whose requests are at engines by the core's grants."""
        with self._link.lock:
            return [
                call for call in self._calls.values() if call.phase is CallPhase.GRANTED and call.backend is not None
            ]

    def expire(self) -> None:
        """Let grants hold no more that were not used yet: this replica's lease is over, and places go to others."""
        with self._link.lock:
            if self._closing:  # nothing would come of their wait
                return
            for call in self._calls.values():
                unused = call.phase is CallPhase.GRANTED and not call.gone
                if unused and call.grant is not None and call.grant.backend is not None:
                    call.expires()

    def forked(self) -> None:
        """Forget the parent's calls, in a child."""
        self._calls = {}
        self._hung_up.clear()
        self._unconfirmed.clear()
        self._unsent.clear()
        self._contexts.forked()

    def close(self) -> None:
        """End those that wait; there are no more."""
        self._closing = True
        for call in self.waiting():
            call.turn.fail(OrlaClosed(CLOSED))

    # What the core says of them

    def give_up(self, call: str) -> LinkedCall | None:
        """Take out a call that waits, since another core decides about it; under the link's lock."""
        known = self._calls.get(call)
        if known is None or known.phase not in (CallPhase.WAITING, CallPhase.MISSED):
            return None
        return self._calls.pop(call)

    def take(self, grant: Grant) -> None:
        """Let a call go, if the grant is one that it waits for."""
        if grant.epoch < self._link.epoch:  # of a core that another one followed
            return
        with self._link.lock:
            call = self._calls.get(grant.call)
            if call is None:
                return
            if grant.backend is not None and grant.backend not in self._schedulers:
                cause = f"this replica cannot reach backend {shown(grant.backend)}"
                self._link.send(
                    Missed(
                        grant.call, grant.attempt, cause, unreachable=False, overloaded=False, elsewhere=True,
                        retry_after_s=None,
                    )
                )  # fmt: skip
                return
            taken = call.granted(grant)
        if taken:
            call.turn.come()

    def refuse(self, refusal: Refused) -> None:
        """Let a call end by the core's word."""
        with self._link.lock:
            call = self._calls.get(refusal.call)
            waited = call is not None and call.refused(refusal)
        if call is not None and waited:
            call.turn.come()

    def confirmed(self, number: int) -> None:
        """Note that the core has had all that was sent before a ``Renew``."""
        while self._unconfirmed and self._unconfirmed[0][0] <= number:
            self._unconfirmed.popleft()

    # What is said of them on a new connection; under the link's lock

    def again(self, epoch: int) -> Iterator[Message]:
        """Yield what a core of *epoch* must know: calls that ended, that hold a grant, and that wait."""
        ends = [end for _, end in self._unconfirmed]
        for call, end in self._unsent:
            assert call.grant is not None
            if call.grant.epoch != epoch and call.grant.backend is not None:
                yield call.adopting()  # for its budgets: that core has never heard of it
            ends.append(end)
        self._unsent.clear()
        self._unconfirmed = deque(((self._link.number, end) for end in ends), maxlen=MOST_UNSAID)
        yield from ends
        yield from self._contexts.again(epoch)
        for call in self._calls.values():
            if call.phase in AT_ENGINE and call.grant is not None and call.grant.backend is not None:
                yield call.adopting()
        for call in self._calls.values():
            if call.phase is CallPhase.WAITING:
                yield call.entering()
            elif call.phase is CallPhase.MISSED:
                yield from _missed(call, epoch)


def _missed(call: LinkedCall, epoch: int) -> Iterator[Message]:
    """Yield what a core must know of a call whose failed attempt may not have been heard of."""
    assert call.grant is not None and call.report is not None
    yield call.entering()
    if call.grant.epoch == epoch:
        yield call.report
    else:
        call.phase = CallPhase.WAITING
