"""Many pools in virtual time: in each a real core with its links, simulated engines behind it, replicas before it.

All of a core is real but for its sockets: bytes of messages come in, are read and decided upon, and bytes go out. CPU
is counted where a core's process would spend it (``CoreMeter``); what engines and replicas take is not in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from typing import Any

from bench.lib import core
from orla_lg import Limit, Limits
from orla_lg.link.framing import FrameReader, frame
from orla_lg.link.messages import (
    PROTOCOL,
    End,
    Enter,
    FirstToken,
    Grant,
    Hello,
    Message,
    Ready,
    Refused,
    Renew,
    Signal,
    flat,
    read,
)
from orla_lg.link.views import flat_limits
from orla_lg.mappers.load import LoadAware
from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import AccessKey, Keyring, KeyScope, create
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.link.hosted import HostedCall
from orla_lg.serve.link.session import LinkSession
from orla_lg.serve.pools.directory import CorePlace, Directory
from orla_lg.serve.pools.slices import SliceBook
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.scoped import POOLS, ScopedStore
from orla_lg.serve.store.spent import SpentKeeper
from orla_lg.serve.store.store import Fence, Instant, Lease, MemoryStore, Versioned
from orla_lg.testing.virtual import StillAdapter, VirtualBackground, VirtualClock, VirtualLoop
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Kind, SimRequest

STAGES, CHARS = 8, 400
ANSWER_TOKENS = 8
ENGINE = EngineParameters(
    step_s=0.02, prefill_token_s=0.0, prefill_attention_s=0.0, decode_sequence_s=0.0, decode_context_s=0.0,
    request_s=0.0, max_running=64, max_batch_tokens=1 << 20, kv_blocks=1 << 16, context_tokens=1 << 17,
    prefix_caching=False,
)  # fmt: skip
"""Steps of a fiftieth of a second: a call takes about a fifth, and an engine of 64 at once does 320 a second."""

RENEW_S = 0.5


@dataclass(frozen=True)
class Shape:
    """One load on so many pools."""

    pools: int = 1
    workflows_per_s: float = 156.25
    """Of each pool."""
    calls: int = 4
    backends: int = 12
    replicas: int = 4
    """Of each pool; each has a link to the next pool as well, where there is one."""
    messages: int = 10
    """Of a workflow's first prompt; each call has two more."""
    two_pools: float = 0.2
    """The part of workflows whose second half runs in the next pool."""
    keys: int = 20
    """Each with a limit of tokens a day, and used in all pools; 0: there are no keys."""
    run_limits: bool = False
    """Each run may make so many calls."""
    waiting: int = 0
    """Calls that wait in each pool all the time, of a backend that is full."""
    seed: int = 0


class CoreMeter:
    """CPU of cores, by what it was spent on; what they do runs in one thread, one after the other."""

    PLACES: Sequence[tuple[type, str, str]] = (
        (LinkSession, "data_received", "calls"), (LinkSession, "_flush", "calls"),
        (HostedCall, "_turn_came", "calls"), (HostedCall, "_too_late", "calls"),
        (LinkHost, "_tick", "ticks"), (SliceBook, "work", "slices"),
        (SpentKeeper, "_write", "spent"),
    )  # fmt: skip

    def __init__(self) -> None:
        self.spent_s = Counter[str]()
        self.functions = 0
        """Called, Python's and C's; the same on each machine, however busy it is."""
        self.counts = False
        """Functions are counted; time is of no use then."""
        self._inside = False

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Count what runs within."""
        before = [(kind, name, kind.__dict__[name]) for kind, name, _ in self.PLACES]
        for kind, name, what in self.PLACES:
            setattr(kind, name, self._timed(kind.__dict__[name], what))
        try:
            yield
        finally:
            for kind, name, function in before:
                setattr(kind, name, function)

    def _timed(self, function: Callable[..., Any], what: str) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            if self._inside:
                return function(*args)
            self._inside, began = True, time.thread_time()
            if self.counts:
                sys.setprofile(self._event)
            try:
                return function(*args)
            finally:
                if self.counts:
                    sys.setprofile(None)
                self.spent_s[what] += time.thread_time() - began
                self._inside = False

        return timed

    def _event(self, frame: object, event: str, argument: object) -> None:
        self.functions += event in ("call", "c_call")


class CountingStore(MemoryStore):
    """A store that counts what it is asked, by what it is about."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.asked = Counter[str]()

    def _count(self, what: str, key: str) -> None:
        key = key.split("/", 2)[2] if key.startswith(POOLS) and key.count("/") > 1 else key
        self.asked[f"{what} {key.split('/', 1)[0]}"] += 1

    def get(self, key: str) -> Versioned | None:
        self._count("get", key)
        return super().get(key)

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        self._count("put", key)
        return super().put(key, value, expected=expected, fence=fence)

    def scan(self, prefix: str) -> dict[str, Versioned]:
        self._count("scan", prefix)
        return super().scan(prefix)

    def lease(self, name: str, holder: str, ttl_s: float) -> Lease | None:
        self._count("lease", name)
        return super().lease(name, holder, ttl_s)


class Wire(asyncio.Transport):
    """The core's end of a connection in memory."""

    def __init__(self, received: Callable[[bytes], None]) -> None:
        super().__init__()
        self._received = received

    def write(self, data: Any) -> None:
        self._received(bytes(data))

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Have none."""

    def is_closing(self) -> bool:
        return False

    def close(self) -> None:
        """Stay."""

    abort = close


class EngineAdapter(StillAdapter):
    """An engine that needs no fields of its own."""

    def request_fields(self, ask: Any, told: Any) -> dict[str, Any]:
        return {}


class SimulatedBackend:
    """An engine on the clock of all."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock, self._engine = clock, SimEngine(ENGINE)
        self._calls: dict[str, tuple[Callable[[], None], Callable[[int], None]]] = {}
        self._due_s: float | None = None

    def submit(self, call: str, prompt: int, first: Callable[[], None], finished: Callable[[int], None]) -> None:
        self._calls[call] = first, finished
        self._engine.submit(SimRequest(call, prompt, ANSWER_TOKENS), self._clock())
        self._arm()

    def _arm(self) -> None:
        at_s = self._engine.next_event_s()
        if at_s is not None and (self._due_s is None or at_s < self._due_s):
            self._due_s = at_s
            self._clock.call_at(at_s, partial(self._wake, at_s))

    def _wake(self, at_s: float) -> None:
        if at_s != self._due_s:
            return
        self._due_s = None
        for event in self._engine.advance(self._clock()):
            if event.kind is Kind.FIRST_TOKEN:
                self._calls[event.id][0]()
            elif event.kind is Kind.FINISHED:
                self._calls.pop(event.id)[1](event.tokens)
        self._arm()


class PoolCore:
    """One pool: its core, the links' host, its engines."""

    def __init__(self, world: World, number: int) -> None:
        shape, self.name = world.shape, f"pool-{number}"
        names = [f"{self.name}-{each}" for each in range(shape.backends)]
        stages = {f"stage-{at}": [*names[at % len(names) :], *names[: at % len(names)]] for at in range(STAGES)}
        backends = {
            core.Backend(name, f"http://{name}/v1", max_concurrency=ENGINE.max_running): EngineAdapter()
            for name in names
        }
        full = core.Backend(f"{self.name}-full", "http://full/v1", max_concurrency=1)
        self.engines = {name: SimulatedBackend(world.clock) for name in names}
        self.serving = core.Serving(
            {**backends, full: EngineAdapter()}, mapper=LoadAware({**stages, "full": full.name}),
            memory=core.memory_policy("default"), clock=world.clock, background=VirtualBackground(world.loop),
            stage_policy="workflow_fcfs", request_policy="fcfs",
        )  # fmt: skip
        self.lease = CoreLease(ScopedStore(world.store, self.name), clock=world.clock, holder=self.name)
        access = world.access
        self.host = LinkHost(
            self.serving, ScopedStore(world.store, self.name), self.lease, layers=access.layers,  # type: ignore[arg-type]
            taken=access.enter, pending=access.pending,  # type: ignore[arg-type]
        )  # fmt: skip
        Directory(world.store).announce(CorePlace(self.name, (f"http://{self.name}",), 1, tuple(names)))
        self.slots = self.host.share_limits(world.store, self.name)


class SimulatedReplica:
    """A process that calls, in as far as the core sees of it: bytes."""

    def __init__(self, world: World, number: int, pools: Sequence[PoolCore]) -> None:
        self.world, self.name = world, f"replica-{number}"
        self.links = {pool.name: _Link(self, pool) for pool in pools}
        self.pools = list(pools)
        self.calls: dict[str, _Workflow] = {}

    def begin(self, name: str) -> None:
        """Let a workflow begin."""
        world, shape = self.world, self.world.shape
        first = self.pools[0]
        second = self.pools[-1] if world.dice.random() < shape.two_pools else first
        half = shape.calls // 2
        _Workflow(self, name, [first] * half + [second] * (shape.calls - half)).next()


@dataclass(eq=False)
class _Link:
    replica: SimulatedReplica
    pool: PoolCore
    _number: int = 0

    def __post_init__(self) -> None:
        world = self.replica.world
        self._reader = FrameReader()
        self.session = self.pool.host.session(world.caller(self.replica.name))
        self.session.connection_made(Wire(self._received))
        self.say(Hello(PROTOCOL, self.replica.name, host="elsewhere", pid=4711), Ready())
        world.clock.call_later(RENEW_S * world.dice.random(), self._renew)

    def _renew(self) -> None:
        self._number += 1
        self.say(Renew(self._number))
        self.replica.world.clock.call_later(RENEW_S, self._renew)

    def say(self, *messages: Message) -> None:
        data = b"".join(frame(flat(message)) for message in messages)
        world = self.replica.world
        world.bytes_in += len(data)
        world.messages_in.update(type(message).__name__ for message in messages)
        world.loop.call_soon(self.session.data_received, data)

    def _received(self, data: bytes) -> None:
        world = self.replica.world
        world.bytes_out += len(data)
        world.loop.call_soon(self._take, data)

    def _take(self, data: bytes) -> None:
        for fields in self._reader.feed(data):
            self.replica.world.messages_out[fields[0]] += 1
            if fields[0] not in ("Grant", "Refused"):
                continue
            message = read(fields)
            assert isinstance(message, Grant | Refused)
            workflow = self.replica.calls.pop(message.call, None)
            if workflow is not None:
                workflow.took(message)


@dataclass(eq=False)
class _Workflow:
    replica: SimulatedReplica
    name: str
    pools: Sequence[PoolCore]
    made: int = 0
    used: dict[str, _Link] = field(default_factory=dict)
    grant: Grant | None = None

    def next(self) -> None:
        """Make the next call, or end."""
        world, at = self.replica.world, self.made
        if at == len(self.pools):
            for link in self.used.values():
                link.say(Signal("run_ended", self.name, {"outcome": "done"}))
            world.ended += 1
            return
        self.made += 1
        pool = self.pools[at]
        link = self.replica.links[pool.name]
        begins = pool.name not in self.used
        self.used[pool.name] = link
        stage, call = f"stage-{(world.numbers_of(self.name) + at) % STAGES}", f"{self.name}-{at}"
        self.replica.calls[call] = self
        told: list[Message] = []
        if begins:
            told.append(Signal("run_started", self.name, {"age_s": 0.0, "thread": None, "graph": ""}))
        told.append(Signal("node_entered", self.name, {"stage": stage, "namespace": "", "step": at}))
        link.say(*told, world.enter(call, self.name, stage, world.shape.messages + 2 * at))

    def took(self, message: Grant | Refused) -> None:
        world = self.replica.world
        link = self.used[self.pools[self.made - 1].name]
        if isinstance(message, Refused):
            world.refused[message.kind] += 1
            self.made = len(self.pools)
            self.next()
            return
        assert message.backend is not None
        self.grant = message
        prompt = CHARS * (world.shape.messages + 2 * self.made) // 4
        link.pool.engines[message.backend].submit(
            message.call, prompt, partial(self._first, link, message), partial(self._finished, link, message, prompt)
        )

    def _first(self, link: _Link, grant: Grant) -> None:
        link.say(FirstToken(grant.call, grant.attempt))

    def _finished(self, link: _Link, grant: Grant, prompt: int, tokens: int) -> None:
        world = self.replica.world
        world.finished += 1
        stage = f"stage-{(world.numbers_of(self.name) + self.made - 1) % STAGES}"
        link.say(
            End(grant.call, None, broke=False, prompt_tokens=prompt, cached_tokens=0, completion_tokens=tokens),
            Signal("node_left", self.name, {"stage": stage, "namespace": ""}),
        )
        self.next()


class World:
    """All pools on one loop, one clock, one store."""

    def __init__(self, shape: Shape) -> None:
        self.shape, self.dice = shape, random.Random(shape.seed)
        self.clock = VirtualClock(1000.0)
        self.loop = VirtualLoop(self.clock)
        self.store = CountingStore(now=lambda: Instant(self.clock(), "boot", self.clock()))
        keys = [self._key(number) for number in range(shape.keys)]
        self.access = Access(Keyring(self.store))
        self._callers = [
            self.access.admit([(b"x-api-key", key.encode())], scope=KeyScope.LINK, loopback=False) for key in keys
        ] or [self.access.admit([], scope=KeyScope.LINK, loopback=True)]
        self.bytes_in = self.bytes_out = self.finished = self.ended = 0
        self.messages_in, self.messages_out, self.refused = Counter[str](), Counter[str](), Counter[str]()
        self._numbers = count()
        self._hashes = [self.dice.getrandbits(63) for _ in range(1024)]
        self._layers = (
            [{"key": "graph", "where": "", "of_run": False, "limits": flat_limits(Limits(run=Limit(calls=50)))}]
            if shape.run_limits else []
        )  # fmt: skip
        self.pools = [PoolCore(self, number) for number in range(shape.pools)]
        self.replicas: list[SimulatedReplica] = []
        self.run(self._start())

    def _key(self, number: int) -> str:
        limits = (Limit(tokens=10**12, per_s=86_400.0),)
        return create(
            self.store,
            lambda key_id, sha256: AccessKey(key_id, f"key-{number}", sha256, (KeyScope.LINK,), limits=limits),
        )[1]

    def caller(self, replica: str) -> Any:
        """Return what a replica's key allows."""
        return self._callers[int(replica.rpartition("-")[2]) % len(self._callers)]

    @staticmethod
    def numbers_of(workflow: str) -> int:
        """Return a workflow's number."""
        return int(workflow.rpartition("-")[2])

    async def _start(self) -> None:
        for pool in self.pools:
            await pool.host.start()
        for number in range(self.shape.pools * self.shape.replicas):
            at = number % self.shape.pools
            own = [self.pools[at], self.pools[(at + 1) % len(self.pools)]][: len(self.pools)]
            self.replicas.append(SimulatedReplica(self, number, own))
        await asyncio.sleep(0)
        for number, pool in enumerate(self.pools):
            for each in range(self.shape.waiting + 1 if self.shape.waiting else 0):
                at = number + self.shape.pools * (each % self.shape.replicas)
                call = f"waits-{number}-{each}"
                waits = self.enter(call, f"waits-{each}", "full", self.shape.messages, run=None)
                self.replicas[at].links[pool.name].say(waits)
        for number in range(self.shape.pools):
            self._arrive(number)

    def _arrive(self, pool: int) -> None:
        """Let a workflow come to a pool, and the next one after a while."""
        name = f"w-{pool}-{next(self._numbers)}"
        at = pool + self.shape.pools * self.dice.randrange(self.shape.replicas)
        self.replicas[at].begin(name)
        self.clock.call_later(self.dice.expovariate(self.shape.workflows_per_s), partial(self._arrive, pool))

    def enter(self, call: str, workflow: str, stage: str, messages: int, run: str | None = "") -> Enter:
        """Return a call's arrival."""
        begin, own = self.numbers_of(workflow) % 512, self._hashes[hash(stage) % 8]
        hashes = [
            own,
            *((own + self._hashes[(begin + at) % 1024] + begin * at) & (2**63 - 1) for at in range(1, messages)),
        ]
        return Enter(
            call, 0.0, workflow, workflow if run == "" else run, stage, 0, "", thread=False, identified=True,
            model="main", stream=True, json_schema=False, tools=False, embeds=False, images=False, may_pass=False,
            hashes=hashes, chars=[CHARS] * messages, answers=list(range(2, messages, 2)),
            prompt_chars=CHARS * messages, tools_chars=0, max_tokens=None, said={}, hints={}, own=None, able=None,
            holds=[], max_attempts=3, timeout_s=None, layers=self._layers if run == "" else [],
        )  # fmt: skip

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def pass_time(self, seconds: float) -> None:
        """Let virtual time pass."""
        self.run(asyncio.sleep(seconds))

    def forget(self) -> None:
        """Count from here on."""
        self.bytes_in = self.bytes_out = self.finished = self.ended = 0
        for each in (self.messages_in, self.messages_out, self.refused, self.store.asked):
            each.clear()

    def close(self) -> None:
        """Leave it all where it is."""
        for pool in self.pools:
            if pool.host._timer is not None:
                pool.host._timer.cancel()
            for replica in pool.host.replicas.values():
                for call in replica.calls.values():
                    call.withdraw()
                replica.calls.clear()
        self.loop.close()
