"""Linked cores in virtual time: hosts on one store, and replicas that say what a test has them say."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.limits.limits import NO_LIMITS, Limits
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.serving import Serving
from orla_lg.link.framing import FrameReader, frame
from orla_lg.link.messages import (
    PROTOCOL,
    Adopt,
    Bye,
    End,
    Enter,
    FirstToken,
    Grant,
    Hello,
    Message,
    Missed,
    Ready,
    Refused,
    Renew,
    flat,
    read,
)
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.link.host import LinkHost
from orla_lg.serve.link.session import LinkSession
from orla_lg.serve.store.lease import CoreLease
from orla_lg.serve.store.store import Instant, MemoryStore
from orla_lg.testing.virtual import StillAdapter, VirtualBackground, VirtualClock, VirtualLoop

T = TypeVar("T")
M = TypeVar("M", bound=Message)


@dataclass(frozen=True)
class Key:
    """What a key allows."""

    key_id: str | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    tenants: tuple[str, ...] | None = None
    backends: tuple[str, ...] | None = None
    stages: tuple[str, ...] | None = None
    scopes: frozenset[KeyScope] = frozenset(KeyScope)


OPEN = Key()


class Wire(asyncio.Transport):
    """The host's end of a connection in memory; what it writes is read at once at the other end."""

    def __init__(self, received: Callable[[Message], None], lost: Callable[[], None]) -> None:
        super().__init__()
        self.open = True
        self.high = 0
        self._reader = FrameReader()
        self._received = received
        self._lost = lost

    def write(self, data: Any) -> None:
        for fields in self._reader.feed(bytes(data)):
            message = read(fields)
            assert message is not None
            self._received(message)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self.high = high or 0

    def is_closing(self) -> bool:
        return not self.open

    def close(self) -> None:
        if self.open:
            self.open = False
            self._lost()

    abort = close


class Core:
    """One host with its core, as a process would have it; ``kill`` ends it without a word."""

    def __init__(
        self,
        world: World,
        *,
        bound: int | None = 2,
        backends: Mapping[Backend, BackendAdapter] | None = None,
        mapper: Mapper | None = None,
        policy: str = "fcfs",
        limits: Limits = NO_LIMITS,
        warm_up: WarmUp | None = None,
        **more: Any,
    ) -> None:
        self.frozen = False
        self.world = world
        given = backends or {Backend("a", "http://a/v1", max_concurrency=bound): StillAdapter()}
        self.serving = Serving(
            given, mapper=mapper, stage_policy=policy, request_policy=policy, memory=memory_policy("default"),
            limits=limits, warm_up=warm_up, clock=world.clock, background=VirtualBackground(world.loop),
        )  # fmt: skip
        self.lease = CoreLease(world.store, clock=world.clock, holder=f"core-{len(world.cores)}")
        self.deposed = False
        self.host = LinkHost(
            self.serving, world.store, self.lease, on_deposed=lambda: setattr(self, "deposed", True), **more
        )
        world.cores.append(self)

    def start(self) -> None:
        self.world.run(self.host.start())

    def run_until_deposed(self) -> None:
        """Let another core take over while this one does not renew."""
        timer = self.host._timer
        assert timer is not None
        timer.cancel()
        self.world.clock._now_s += 3.0
        assert CoreLease(self.world.store, clock=self.world.clock, holder="another").take()
        self.host._tick()
        assert self.deposed

    def kill(self) -> None:
        """Let it be gone: nothing of it runs any more, and its connections end."""
        self.host._timer.cancel()  # type: ignore[union-attr]
        for session in list(self.host.sessions):
            session._ended = True
            session._transport.close()  # type: ignore[union-attr]


class World:
    """A loop in virtual time, a store, and the cores on it."""

    def __init__(self) -> None:
        self.clock = VirtualClock(1000.0)
        self.loop = VirtualLoop(self.clock)
        self.store = MemoryStore(now=lambda: Instant(self.clock(), "boot", self.clock()))
        self.cores: list[Core] = []

    def run(self, work: Any) -> Any:
        return self.loop.run_until_complete(work)

    def settle(self, seconds: float = 0.0) -> None:
        """Let the loop do what is due, and *seconds* pass."""

        async def wait() -> None:
            await asyncio.sleep(seconds)
            for _ in range(6):
                await asyncio.sleep(0)

        self.run(wait())

    def close(self) -> None:
        for core in self.cores:
            if core.host._timer is not None:
                core.host._timer.cancel()
            for replica in core.host.replicas.values():
                for call in replica.calls.values():
                    call.withdraw()
            core.serving.close()
        self.settle()
        self.loop.close()


class Replica:
    """A process that calls: says what the test wants, and keeps what it is told."""

    def __init__(self, world: World, name: str, key: Key = OPEN) -> None:
        self.world = world
        self.name = name
        self.key = key
        self.received: list[Message] = []
        self.session: LinkSession | None = None
        self.wire: Wire | None = None
        self.on_message: Callable[[Message], None] = lambda message: None
        self._renewing = False
        self._number = 0

    def connect(self, core: Core, *, hello: bool = True, ready: bool = True, renews: bool = True) -> None:
        async def begin() -> None:
            wire = self.wire = Wire(self._took, lambda: self._lost(wire))
            session = self.session = core.host.session(self.key)
            session.connection_made(wire)

        self.world.run(begin())
        if hello:
            self.say(Hello(PROTOCOL, self.name, host="elsewhere", pid=4711))
        if ready:
            self.say(Ready())
        if renews and not self._renewing:
            self._renewing = True
            self._renew()
        self.world.settle()

    def _renew(self) -> None:
        if self.world.loop.is_closed():
            return
        if self.connected:
            self._number += 1
            self.say(Renew(self._number))
        self.world.clock.call_later(0.5, self._renew)

    @property
    def connected(self) -> bool:
        return self.wire is not None and self.wire.open

    def _took(self, message: Message) -> None:
        self.received.append(message)
        self.on_message(message)

    def _lost(self, wire: Wire) -> None:
        session = self.session
        if wire is self.wire and session is not None:
            self.world.loop.call_soon(session.connection_lost, None)

    def say(self, *messages: Message) -> None:
        """Send messages, in one piece of bytes."""
        if self.connected and self.session is not None:
            session, data = self.session, b"".join(frame(flat(message)) for message in messages)
            self.world.loop.call_soon(session.data_received, data)

    def tell(self, *messages: Message) -> None:
        """Send messages and let the core answer."""
        self.say(*messages)
        self.world.settle()

    def drop(self) -> None:
        """Let the connection end without a word."""
        assert self.wire is not None
        self.wire.close()
        self.world.settle()

    def got(self, kind: type[M]) -> list[M]:
        return [message for message in self.received if isinstance(message, kind)]

    def grants(self) -> list[str]:
        return [grant.call for grant in self.got(Grant)]

    def refusals(self) -> dict[str, str]:
        return {refused.call: f"{refused.kind}: {refused.text}" for refused in self.got(Refused)}

    def bye(self) -> str | None:
        return next((bye.reason for bye in self.got(Bye)), None)


def enter(call: str, **more: Any) -> Enter:
    """Return an ordinary call's arrival."""
    fields: dict[str, Any] = {
        "age_s": 0.0, "workflow": f"w-{call}", "run": None, "stage": "answer", "step": None, "namespace": "",
        "thread": False, "identified": True, "model": "a", "stream": True, "json_schema": False, "tools": False,
        "embeds": False, "images": False, "may_pass": False, "hashes": [11, 12], "chars": [40, 60], "answers": [],
        "prompt_chars": 90, "tools_chars": 0, "max_tokens": None, "said": {}, "hints": {}, "own": None, "able": None,
        "holds": [], "max_attempts": 3, "timeout_s": None, "layers": [], "attempts": 0,
    }  # fmt: skip
    return Enter(call, **{**fields, **more})


def first(call: str, attempt: int = 1) -> FirstToken:
    return FirstToken(call, attempt)


def end(call: str, error: str | None = None, **more: Any) -> End:
    fields: dict[str, Any] = {"prompt_tokens": 25, "cached_tokens": 0, "completion_tokens": 7}
    return End(call, error, more.pop("broke", False), **{**fields, **more})


def missed(call: str, attempt: int = 1, cause: str = "refused", **more: Any) -> Missed:
    fields: dict[str, Any] = {"unreachable": False, "overloaded": False, "elsewhere": False, "retry_after_s": None}
    return Missed(call, attempt, cause, **{**fields, **more})


def adopted(call: str, *, backend: str = "a", attempt: int = 1, first: bool = True, **more: Any) -> Adopt:
    slot = more.pop("slot", None)
    return Adopt(list(enter(call, **more)), backend, None, attempt, first, slot)


__all__: Sequence[str] = ()
