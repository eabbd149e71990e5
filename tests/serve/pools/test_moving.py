"""Random interleavings of two replicas' sides and three cores that contradict each other, come and go: no sockets.

A call is known to one core at a time and ends once, whatever is lost on the way; after each step the integrity of the
replica is checked, and in the end, when the cores agree, each call has been served or refused.
"""

from __future__ import annotations

import random
import threading
from collections import deque
from typing import Any

import pytest

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Backend
from orla_lg.core.identity import Identity
from orla_lg.link.call import CallPhase, LinkedCall
from orla_lg.link.entrances import MOST_MOVES
from orla_lg.link.following import CoreAddresses
from orla_lg.link.messages import Adopt, End, Enter, Grant, Message, Moved, Signal, Welcome
from orla_lg.link.serving import LinkedServing
from orla_lg.link.views import flat_backend
from orla_lg.openai_api.adapter import OpenAIAdapter

BACKENDS = {"a": "one", "b": "one", "c": "two", "d": "three"}
"""By name, the pool that is right."""

POOLS = sorted(set(BACKENDS.values()))


class FakeLink:
    """A link whose messages a test carries."""

    def __init__(self, pool: str) -> None:
        self.lock = threading.RLock()
        self.replica, self.epoch, self.number = f"r-{pool}", 1, 0
        self.up, self.fault, self.beginning, self.lost_s, self.confirmed_s = False, "down", False, 0.0, float("inf")
        self.places = CoreAddresses((), has_key=False, pool=pool)
        self.sent: deque[Message] = deque()
        self.listener: Any = None

    def send(self, message: Message) -> bool:
        if self.up:
            self.sent.append(message)
        return self.up

    def begin(self, listener: Any) -> None:
        self.listener = listener

    def tells(self, other: Any, urls: Any) -> None: ...

    def drop(self, why: str) -> None: ...

    def stop(self, wait_s: float = 0.0) -> None:
        self.up = False


class ModelCore:
    """A core that maps at random, and believes something of where backends are."""

    def __init__(self, pool: str, dice: random.Random) -> None:
        self.pool, self.dice, self.believes = pool, dice, dict(BACKENDS)
        self.waiting: dict[str, str] = {}
        """By call, the backend."""
        self.granted: dict[str, str] = {}
        self.runs = set[str]()
        self.said: deque[Message] = deque()

    def hear(self, message: Message) -> None:
        if isinstance(message, Enter):
            self.enter(message)
        elif isinstance(message, Adopt):
            self.granted[message.enter[0]] = message.backend
        elif isinstance(message, End):
            self.waiting.pop(message.call, None)
            self.granted.pop(message.call, None)
        elif isinstance(message, Signal) and message.what in ("run_started", "run_ended"):
            (self.runs.add if message.what == "run_started" else self.runs.discard)(message.run)

    def enter(self, enter: Enter) -> None:
        if enter.call in self.granted:
            self.said.append(self.grant_of(enter.call))
            return
        assert enter.run in self.runs, "a core knows the run of a call that comes"
        backend = enter.own["backend"] if enter.own is not None else self.dice.choice(list(BACKENDS))
        if (pool := self.believes[backend]) == self.pool:
            self.waiting[enter.call] = backend
        else:
            own = {"backend": backend, "mapper": "model", "reason": "said"}
            self.waiting.pop(enter.call, None)
            self.said.append(Moved(enter.call, pool, own))

    def grant(self, call: str) -> None:
        self.granted[call] = self.waiting.pop(call)
        self.said.append(self.grant_of(call))

    def grant_of(self, call: str) -> Grant:
        return Grant(call, 1, 1, self.granted[call], None)

    def lost(self) -> None:
        self.waiting.clear()
        self.said.clear()


class World:
    """A replica, three cores, and what is on the way between them."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)
        self.links = {pool: FakeLink(pool) for pool in POOLS}
        self.cores = {pool: ModelCore(pool, self.dice) for pool in POOLS}
        home: Any = self.links["one"]
        self.serving = LinkedServing(
            home, self.welcome("one"), adapter_of=OpenAIAdapter, key_in=lambda name: None, version="",
            link_to=lambda pool: self.links[pool],  # type: ignore[arg-type, return-value]
        )  # fmt: skip
        home.listener = self.serving.cores.home
        self.calls: list[LinkedCall] = []
        self.under_way: list[LinkedCall] = []
        self.refused = 0
        self.number = 0
        for pool in POOLS:
            self.connect(pool)

    def welcome(self, pool: str) -> Welcome:
        flats = {name: flat_backend(Backend(name, "http://127.0.0.1:9/v1")) for name in BACKENDS}
        pools = [
            {"name": name, "pool": of} if of == pool else {**flats[name], "pool": of} for name, of in BACKENDS.items()
        ]
        mine = [flats[name] for name, of in BACKENDS.items() if of == pool]
        return Welcome(1, 1, backends=mine, pool=pool, pools=pools, cores={each: [] for each in POOLS})

    # What may happen

    def connect(self, pool: str) -> None:
        link = self.links[pool]
        if link.up or link.listener is None:
            return
        with link.lock:
            said = link.listener.opening(self.welcome(pool))
            link.up = True
            core = self.cores[pool]
            core.runs.clear()
            spoken = {each.call for each in said if isinstance(each, Enter)}
            spoken |= {each.enter[0] for each in said if isinstance(each, Adopt)}
            core.granted = {call: backend for call, backend in core.granted.items() if call in spoken}
            link.sent.extend(said)

    def disconnect(self, pool: str) -> None:
        link = self.links[pool]
        if link.up:
            link.up = False
            link.sent.clear()
            self.cores[pool].lost()
            link.listener.disconnected("a test cuts it")

    def arrive(self) -> None:
        self.number += 1
        run = f"run-{self.number % 5}"
        if self.serving.book.run(run) is None:
            self.serving.progress.run_started(run, thread=None)
        stage = self.dice.choice(["x", "y", "z"])
        call = self.serving.arrive(Identity(run, run, stage), Ask("any", []), call_id=f"call-{self.number}")
        assert isinstance(call, LinkedCall)
        call.max_attempts = 3
        self.calls.append(call)
        self.serving.enter(call)

    def carry_in(self, pool: str) -> None:
        link = self.links[pool]
        if link.sent:
            self.cores[pool].hear(link.sent.popleft())

    def carry_out(self, pool: str) -> None:
        core, link = self.cores[pool], self.links[pool]
        if core.said and link.up:
            link.listener.heard(core.said.popleft())

    def grant(self, pool: str) -> None:
        core = self.cores[pool]
        if core.waiting and self.links[pool].up:
            core.grant(self.dice.choice(list(core.waiting)))

    def believe(self, pool: str) -> None:
        core = self.cores[pool]
        name = self.dice.choice(list(BACKENDS))
        core.believes[name] = self.dice.choice(POOLS)

    def cancel(self, pool: str) -> None:
        waiting = [call for call in self.calls if not call.turn.settled]
        if waiting and self.dice.random() < 0.3:
            call = self.dice.choice(waiting)
            self.calls.remove(call)
            call.finish("cancelled")

    def look(self) -> None:
        """Let calls go on whose turn came, and end some of those under way."""
        for call in [call for call in self.calls if call.turn.settled]:
            self.calls.remove(call)
            call.turn.result()
            if call.refusal is not None:
                assert call.moves >= MOST_MOVES and "one configuration" in call.refusal.text
                self.refused += 1
                call.finish("refused")
            else:
                assert self.serving.leaves(call) and call.phase is CallPhase.GRANTED
                self.under_way.append(call)
        if self.under_way and self.dice.random() < 0.5:
            self.under_way.pop(self.dice.randrange(len(self.under_way))).finish()

    def check(self, *, all_of_it: bool = False) -> None:
        for core in self.serving.cores.all():
            core.check_integrity()
        if all_of_it:
            self.serving.check_integrity()
        held = [call for core in self.cores.values() for call in (*core.waiting, *core.granted)]
        gone = {call for call in held if held.count(call) > 1}
        assert not gone, f"known to two cores: {gone}"

    def settle(self) -> None:
        """Let all cores agree, and carry all that there is."""
        for pool in POOLS:
            self.cores[pool].believes = dict(BACKENDS)
            self.connect(pool)
        for _ in range(10_000):
            for pool in POOLS:
                self.carry_in(pool)
                self.carry_out(pool)
                self.grant(pool)
            self.look()
            if not (self.calls or self.under_way or any(self.links[pool].sent for pool in POOLS)):
                break
        self.check(all_of_it=True)


STEPS = ("arrive", "carry_in", "carry_out", "grant", "believe", "disconnect", "connect", "cancel", "look")
WEIGHTS = (3, 8, 8, 4, 1, 0.4, 1, 1, 4)


@pytest.mark.parametrize("start", range(4))
def test_calls_move_among_cores_that_contradict_each_other_and_end_once(start: int) -> None:
    refused = moved = 0
    for seed in range(start * 10, start * 10 + 10):
        world = World(seed)
        for _ in range(250):
            (step,) = world.dice.choices(STEPS, WEIGHTS)
            if step in ("arrive", "look"):
                getattr(world, step)()
            else:
                getattr(world, step)(world.dice.choice(POOLS))
            world.check()
        world.settle()
        assert not world.calls and not world.under_way, "each call has ended"
        assert not any(core.waiting or core.granted for core in world.cores.values()), "and each core knows it"
        for number in range(5):
            world.serving.progress.run_ended(f"run-{number}", "done")  # type: ignore[arg-type]
        for pool in POOLS:
            while world.links[pool].sent:
                world.carry_in(pool)
            assert not world.cores[pool].runs, "no claim of a run is left in a pool"
        refused += world.refused
        moved += sum(record.error is None for record in world.serving.records.records())
        world.serving.close()
    assert moved > 100


def test_cores_that_send_a_call_in_a_circle_end_it_in_the_end() -> None:
    world = World(1)
    for core in world.cores.values():
        core.believes = dict.fromkeys(BACKENDS, "two" if core.pool != "two" else "three")
    world.cores["three"].believes = dict.fromkeys(BACKENDS, "two")
    world.arrive()
    for _ in range(4 * MOST_MOVES):
        for pool in POOLS:
            while world.links[pool].sent:
                world.carry_in(pool)
            world.carry_out(pool)
    world.look()
    assert world.refused == 1 and not world.calls
    world.check()
    world.serving.close()


def test_a_moved_call_is_told_its_run_first() -> None:
    world = World(2)
    world.cores["one"].believes = dict.fromkeys(BACKENDS, "two")
    world.cores["two"].believes = dict.fromkeys(BACKENDS, "two")
    world.arrive()
    while world.links["one"].sent:
        world.carry_in("one")
    world.carry_out("one")
    said = [type(message).__name__ + getattr(message, "what", "") for message in world.links["two"].sent]
    assert said == ["Signalrun_started", "Enter"]
    assert world.links["two"].sent[1].moved  # type: ignore[union-attr]
    world.serving.close()
