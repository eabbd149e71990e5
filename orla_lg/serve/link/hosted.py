"""A call of a linked replica: its life is led here, its bytes are sent there.

The call is an ordinary ``InFlightCall`` on the way of ``lifecycle``; its sender is the replica. ``Send`` becomes a
``Grant``, and ``FirstToken``, ``Missed`` and ``End`` are what comes back. The steps are carried out by hand, in the
event loop's callbacks: a call that is granted at once, or waits for nothing but its turn, needs no task.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from orla_lg.core.call import Usage
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import MAX_ERROR_CHARS, InFlightCall
from orla_lg.core.lifecycle import Send
from orla_lg.core.limits.usage import NOTHING
from orla_lg.core.placement.elsewhere import BackendElsewhere
from orla_lg.core.prefetch.prompts import Prompt
from orla_lg.core.steps import Step, Steps, Waiter, WaitForTurn
from orla_lg.errors import BackendUnavailable
from orla_lg.link.messages import End, FirstToken, Grant, Message, Missed
from orla_lg.link.views import flat_considered
from orla_lg.serve.link.flat import MOST_TOKENS, Fitting, MissedAttempt, UnusedGrant, bounded, whole

MOST_RETRY_AFTER_S = 86_400.0
MOST_SERVICE_S = 86_400.0


class ReplicaCall(InFlightCall):
    """A call in flight whose edge is another process."""

    __slots__ = ("moves",)

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.moves: Fitting | None = None
        """Where its mapping is noted, so that it can enter at another pool's core; ``None``: it stays here."""

    def finish(self, error: BaseException | str | None = None) -> None:
        """End the call; one that enters at another pool's core was never here."""
        if isinstance(error, BackendElsewhere) and self.moves is not None and self.moves.left is not None:
            self.withdraw()
        else:
            super().finish(error)

    def aged(self, seconds: float) -> None:
        """Let the call have arrived so long ago, at its replica."""
        self.call.arrived_s -= seconds
        self.began_s = self.entered_s = self.call.arrived_s

    @property
    def waits_at(self) -> tuple[str, int] | None:
        """The backend in whose queue it is, or was last, and its arrival number there."""
        if self._queued is None or self.scheduler is None:
            return None
        return self.scheduler.backend.name, self._queued.order

    @property
    def expected_tokens(self) -> int | None:
        """Of its prompt, what should be in the engine's cache; ``None`` before a grant."""
        expected = None if self._queued is None else self._queued.expected
        return None if expected is None else expected.tokens

    def missed(self, failure: AttemptFailed) -> None:
        """Give the grant back; one that was not used is none of the call's attempts."""
        super().missed(failure)
        if isinstance(failure.cause, UnusedGrant):
            self.tried.pop()
            self.attempts -= 1

    def keeps(self, prompt: Prompt) -> None:
        """Note that its replica keeps the prompt: what that begins with may be warmed later."""
        listener = None if self.scheduler is None else self.scheduler.listener
        if listener is not None and self._queued is not None:
            listener.keeping(self._queued, prompt)

    def withdraw(self) -> None:
        """Take the call back as if it had not come: the way to its replica was lost before it was granted."""
        with self._lock:
            if not self._open:
                return
            self._open = False
        if self.reservation is not None:
            self.services.limits.settle(self.reservation, NOTHING)
        self.services.memory.signal(self._give_back(failed=True))
        self.holder = self.fit = None


class ReplicaLine(Protocol):
    """The way to a replica: one connection."""

    def send(self, message: Message) -> None:
        """Send a message soon."""
        ...


def grant_of(inflight: ReplicaCall, epoch: int, attempt: int) -> Grant:
    """Return what the replica needs to send a call."""
    call = inflight.call
    if inflight.external:
        return Grant(call.id, epoch, attempt, None, None, reason=inflight.why_external)
    assignment, slot_lease = inflight.assignment, inflight.slot_lease
    assert assignment is not None
    return Grant(
        call.id, epoch, attempt, inflight.backend, inflight.model, assignment.mapper, assignment.reason,
        dict(assignment.parameters), flat_considered(assignment.considered), inflight.request_fields(),
        inflight.counts_streams, inflight.expected_tokens, None if slot_lease is None else slot_lease.action,
        None if slot_lease is None else slot_lease.slot, call.final_odds,
    )  # fmt: skip


class HostedCall:
    """One call of a replica. Of the loop's thread.

    It waits, or is granted: ``granted`` is its last grant, from the moment when that is given until the call ends or
    misses. Without a ``line`` the replica is gone, and may come back.

    Args:
        inflight: The call.
        line: To its replica.
        epoch: Of this core.
        max_attempts: How often its replica tries.
        over: Called when its steps end with an error, so that the call goes nowhere.
    """

    __slots__ = (
        "_loop", "_over", "_steps", "_task", "_thread", "_timer", "_turn", "attempt", "epoch", "granted", "inflight",
        "line", "max_attempts", "withdrawn",
    )  # fmt: skip

    def __init__(
        self,
        inflight: ReplicaCall,
        line: ReplicaLine,
        epoch: int,
        max_attempts: int,
        over: Callable[[HostedCall, Exception], None],
    ) -> None:
        self.inflight = inflight
        self.line: ReplicaLine | None = line
        self.epoch = epoch
        self.max_attempts = max_attempts
        self.attempt = 0
        self.granted: Grant | None = None
        self.withdrawn: Callable[[], None] | None = None
        """Called where the call is taken back, and so has no record."""
        self._over = over
        self._loop = asyncio.get_running_loop()
        self._thread = threading.get_ident()
        self._steps: Steps | None = None
        self._turn: Waiter | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._task: asyncio.Task[None] | None = None

    # Sender: the replica is asked in ``_go``

    def send(self, inflight: InFlightCall) -> Any:
        """Refuse: there is no thread to wait in."""
        raise NotImplementedError("a hosted call is driven by its loop")

    async def asend(self, inflight: InFlightCall) -> Any:
        """Refuse: there is no task to wait in."""
        raise NotImplementedError("a hosted call is driven by its loop")

    # Its steps

    def begin(self, steps: Steps) -> None:
        """Carry out the call's steps, as far as they go now."""
        self._steps = steps
        self._go(steps.send, None)

    def adopt(self, steps: Steps, attempt: int) -> None:
        """Carry out the steps of a call that is at its engine: its replica has the grant."""
        line, self.line = self.line, None
        self.attempt = attempt - 1
        self.begin(steps)
        self.line = line

    def _go(self, resume: Callable[[Any], Step], value: Any) -> None:
        steps = self._steps
        if steps is None:  # it ended meanwhile
            return
        try:
            step = resume(value)
            if type(step) is Send and step.sender is self:
                try:
                    self._grant()
                    return
                except Exception as error:  # noqa: BLE001 - an adapter's fault is this call's: nothing was sent
                    self.granted = None
                    step = steps.throw(error)
        except StopIteration:  # the response is on its way; ``End`` is to come
            self._steps = None
            return
        except Exception as error:  # noqa: BLE001 - it is the call's, and raised in its replica
            self._steps = None
            self._over(self, error)
            return
        if type(step) is WaitForTurn:
            self._wait(step)
        else:
            self._task = self._loop.create_task(self._carry_out(step))

    def _grant(self) -> None:
        self.attempt += 1
        self.granted = grant_of(self.inflight, self.epoch, self.attempt)
        if self.line is not None:
            self.line.send(self.granted)

    def _wait(self, step: WaitForTurn) -> None:
        self._turn = step.turn
        if step.timeout_s is not None:
            self._timer = self._loop.call_later(step.timeout_s, self._too_late, step.turn)
        step.turn.on_settled(self._woken)

    def _woken(self) -> None:
        """Go on soon; called in any thread, perhaps twice, and often deep in what another call does."""
        if threading.get_ident() == self._thread:
            self._loop.call_soon(self._turn_came)
            return
        with contextlib.suppress(RuntimeError):  # the loop was closed
            self._loop.call_soon_threadsafe(self._turn_came)

    def _turn_came(self) -> None:
        turn, steps = self._turn, self._steps
        if turn is None or steps is None or not turn.settled:
            return
        self._stop_waiting()
        try:
            turn.result()
        except Exception as error:  # noqa: BLE001 - handed to the steps, which raise it again
            self._go(steps.throw, error)
        else:
            self._go(steps.send, None)

    def _too_late(self, turn: Waiter) -> None:
        if self._turn is turn and self._steps is not None and not turn.settled:
            self._stop_waiting()
            self._go(self._steps.throw, TimeoutError())

    def _stop_waiting(self) -> None:
        self._turn = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    async def _carry_out(self, step: Step) -> None:
        steps = self._steps
        if steps is None:
            return
        try:
            done = await step.arun()
        except Exception as error:  # noqa: BLE001 - handed to the steps, which raise it again
            self._task = None
            self._go(steps.throw, error)
        else:
            self._task = None
            self._go(steps.send, done)

    def _stop(self) -> None:
        """Leave the steps where they are."""
        self._stop_waiting()
        task, self._task = self._task, None
        steps, self._steps = self._steps, None
        if task is not None:
            task.cancel()
        if steps is not None:
            steps.close()

    # What the replica says

    def first_token(self, said: FirstToken) -> None:
        """Note that the prefill is done."""
        if self.granted is None or said.attempt != self.attempt:
            return
        self.inflight.first_token()
        if self._steps is not None:
            self._go(self._steps.send, None)

    def missed(self, said: Missed) -> None:
        """Note that an attempt failed before its first token; what follows is the core's to decide."""
        steps = self._steps
        if self.granted is None or said.attempt != self.attempt or steps is None:
            return
        self.granted = None
        retry_after_s = said.retry_after_s
        met = UnusedGrant(said.cause) if said.unused else MissedAttempt(said.cause)
        failure = AttemptFailed(
            met, unreachable=said.unreachable, overloaded=said.overloaded,
            elsewhere=said.elsewhere,
            retry_after_s=None if retry_after_s is None else bounded(retry_after_s, MOST_RETRY_AFTER_S),
        )  # fmt: skip
        self._go(steps.throw, failure)

    def end(self, said: End) -> None:
        """Note that the call is over, wherever it was."""
        inflight = self.inflight
        if self.granted is not None and said.prompt_tokens is not None:
            prompt_tokens, cached_tokens = whole(said.prompt_tokens) or 0, whole(said.cached_tokens)
            prefill_s = None if said.prefill_s is None else bounded(said.prefill_s, MOST_SERVICE_S)
            if cached_tokens is not None:
                cached_tokens = min(cached_tokens, prompt_tokens)
            inflight.saw(
                Usage(prompt_tokens, cached_tokens, whole(said.completion_tokens, MOST_TOKENS) or 0, prefill_s)
            )
        if said.broke and self.granted is not None:
            self._broke(said.error or "the engine's answer broke off")
        else:
            inflight.finish(said.error)
        self.granted = None
        self._stop()

    def _broke(self, error: str) -> None:
        """Do what ``InFlightCall.broke`` does, with the replica's words for the error."""
        if (scheduler := self.inflight.scheduler) is not None:
            scheduler.health.failed(BackendUnavailable(error[:MAX_ERROR_CHARS]), unreachable=True)
        self.inflight.finish(error)

    # What becomes of it without its replica

    @property
    def waits(self) -> bool:
        """Whether it waits for its turn."""
        return self._turn is not None

    def withdraw(self) -> None:
        """Take a call that waits out of its queue."""
        self.inflight.withdraw()
        self._stop()
        if self.withdrawn is not None:
            self.withdrawn()

    def give_up(self, why: str) -> None:
        """End a call whose replica will not end it."""
        self.granted = None
        self.inflight.finish(why)
        self._stop()

    def attach(self, line: ReplicaLine, *, repeats: bool) -> None:
        """Go on with a replica that came back; with *repeats* it did not get the grant, which is given once more."""
        self.line = line
        if repeats and self.granted is not None:
            line.send(self.granted)
