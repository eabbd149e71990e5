"""Calls as a busy server has them, and their ways through the core: the scheduler alone, or all steps."""

from __future__ import annotations

import random
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

from bench.lib import core
from orla_lg.testing.virtual import StillAdapter

STAGES, CALLS_OF_RUN, IN_FLIGHT, TENANTS = 48, 8, 64, 20
MESSAGES = [{"role": "user", "content": "What is the capital of France? " * 8}]


class Load:
    """Calls as a busy server has them: what policies look at differs from call to call."""

    def __init__(self, seed: int = 0) -> None:
        self._dice = random.Random(seed)
        self._numbers = count()
        self._stages = [f"stage {n}" for n in range(STAGES)]
        self._asks = [core.Ask("main", MESSAGES, max_tokens=bound) for bound in range(16, 1040, 16)]
        # Hints are what nodes and runs say, so calls share them.
        self._hints = [
            core.Hints(priority=n % 5, deadline_s=1e4 * (1 + self._dice.random()), tenant=f"tenant {n % TENANTS}")
            for n in range(1000)
        ]

    def next(self) -> tuple[int, str, core.Ask, core.Hints]:
        """Return the number of the next call's run, its stage, what it asks, its hints."""
        dice = self._dice
        stage = self._stages[int(dice.random() ** 2 * STAGES)]
        return next(self._numbers) // CALLS_OF_RUN, stage, dice.choice(self._asks), dice.choice(self._hints)


class Waiting:
    """The least an edge can have: when its turn comes, it joins those that go."""

    __slots__ = ("_joins", "_subject")

    def __init__(self, subject: Any, joins: deque[Any]) -> None:
        self._subject, self._joins = subject, joins

    def __call__(self) -> None:
        self._joins.append(self._subject)


class AtScheduler:
    """Calls through one scheduler alone."""

    def __init__(self, policy: str, load: Load) -> None:
        backend = core.Backend("main", "http://127.0.0.1:1/v1", max_concurrency=IN_FLIGHT, capacity=10_000_000)
        chosen = core.policies("main", policy, policy)
        self.scheduler = core.BackendScheduler(backend, StillAdapter(), core.Background(), time.monotonic, chosen)
        self._load = load
        self._dice = random.Random(1)
        self._run, self._standing = -1, core.RunShare()
        self._in_flight: deque[core.Queued] = deque()

    def enter(self) -> Callable[[], None]:
        """Make a call, and return what is to be timed: its way into the queue."""
        number, stage, ask, hints = self._load.next()
        if number != self._run:
            self._run, self._standing = number, core.RunShare(time.monotonic())
            self._standing.remaining_s = self._dice.expovariate(0.1)
            self._standing.serve(self._dice.expovariate(1e-4), time.monotonic())
        name = f"run {number}"
        call = core.Call(
            f"call {self._dice.random()}", core.Identity(name, name, stage), ask, hints, hints, time.monotonic(),
            self._standing,
        )  # fmt: skip
        return partial(self._enter, call)

    def _enter(self, call: core.Call) -> None:
        queued = self.scheduler.enter(call, order=None, running=True, holds_grant=False)
        if queued.turn is None:
            self._in_flight.append(queued)
        else:
            queued.turn.on_settled(Waiting(queued, self._in_flight))

    def leave(self) -> None:
        """Let the oldest call in flight end; the next one goes."""
        queued = self._in_flight.popleft()
        queued.call.standing.serve(500, time.monotonic())
        self.scheduler.leave(queued, tokens=100, usage=core.Usage(100, 0, 10), followed=lambda: True)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    def close(self) -> None:
        self.scheduler.check_integrity()


class ThroughSteps:
    """Calls the whole way: identified, mapped, queued, sent to nobody, accounted for."""

    max_attempts = 1

    def __init__(self, policy: str, load: Load) -> None:
        backend = core.Backend("main", "http://127.0.0.1:1/v1", max_concurrency=IN_FLIGHT, capacity=10_000_000)
        self.serving = core.Serving(
            {backend: StillAdapter()}, mapper=None, stage_policy=policy, request_policy=policy,
            memory=core.memory_policy("default"), keep_records=1000,
        )  # fmt: skip
        self._load = load
        self._run = -1
        self._open: dict[str, int] = {}
        self._ready: deque[core.Steps] = deque()
        self._sending: deque[tuple[core.Steps, core.Send]] = deque()

    def enter(self) -> Callable[[], None]:
        number, stage, ask, hints = self._load.next()
        run = f"run {number}"
        if number != self._run:
            self._run, self._open[run] = number, CALLS_OF_RUN
            state = self.serving.progress.run_started(run, thread=None, graph="graph")
            self.serving.progress.node_entered(state, stage)
        return partial(self._enter, core.Identity(run, run, stage), ask, hints)

    def _enter(self, identity: core.Identity, ask: core.Ask, hints: core.Hints) -> None:
        inflight = core.arrive(self.serving.services, identity, ask, call_id=self.serving.new_id(), said=hints)
        steps = core.serve(inflight, self)
        effect = next(steps)
        while isinstance(effect, core.Wait):
            effect.run()
            effect = steps.send(None)
        if isinstance(effect, core.WaitForTurn):
            effect.turn.on_settled(Waiting(steps, self._ready))
        else:
            assert isinstance(effect, core.Send)
            self._sending.append((steps, effect))

    def leave(self) -> None:
        steps, send = self._sending.popleft()
        send.inflight.first_token()
        send.inflight.finish()
        _end(steps)
        while self._ready:
            ready = self._ready.popleft()
            self._sending.append((ready, ready.send(None)))
        self._ended(send.inflight.call)

    def _ended(self, call: core.Call) -> None:
        run = call.identity.run
        assert run is not None
        self._open[run] -= 1
        if not self._open[run]:
            del self._open[run]
            self.serving.progress.run_ended(run, core.Outcome.DONE)

    @property
    def in_flight(self) -> int:
        return len(self._sending)

    def close(self) -> None:
        self.serving.check_integrity()
        for _, send in self._sending:
            send.inflight.finish()
        self.serving.close()


def _end(steps: core.Steps) -> None:
    try:
        steps.send(None)
    except StopIteration:
        return
    raise AssertionError("a call goes on after its request")


WAYS: dict[str, Callable[[str, Load], AtScheduler | ThroughSteps]] = {"scheduler": AtScheduler, "steps": ThroughSteps}
