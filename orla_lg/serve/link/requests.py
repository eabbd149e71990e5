"""What a replica may ask of the core, or change in it: a fixed table of names."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

from orla_lg.core.boundary.checked import number
from orla_lg.core.call import Call, Hints
from orla_lg.core.identity import Identity, workflow_key
from orla_lg.core.limits.limits import Limits
from orla_lg.core.operation.steering import KEEP
from orla_lg.core.placement.view import resident_tokens
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.serving import Serving
from orla_lg.core.steps import adrive
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaError, RecordUnknown, did_you_mean, shown
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Flat, Message, Request, RequestDone
from orla_lg.link.thread_leases import LeasesInStore, flat_answer, lease_name, read_owner
from orla_lg.link.views import flat_limits, flat_statistics
from orla_lg.serve.access.keys import KeyScope, allows
from orla_lg.serve.link.flat import (
    MOST_CHARS,
    UNSENT,
    FlatAsk,
    LinkCaller,
    SpokenKeys,
    named,
    numbers,
    speaks_for_others,
    tenant_within,
    workflow_of,
)
from orla_lg.serve.store.store import StoreUnavailable

MOST_OPEN = 100
"""Requests of one replica that take their time, at once."""

MOST_THREADS = 5_000
"""The same where one more is a lease of a thread, which takes a millisecond."""

MOST_LEASE_S = 86_400.0

CHANGING = frozenset({"pause", "resume", "drain", "set_policy", "set_limit"})
"""They change the core for all, so a link's key needs the scope ``control`` for them."""


class Requests:
    """Answers requests. Of the loop's thread.

    Args:
        serving: The core.
        keys: In whose names gateways make calls; ``None``: they ask for none.
    """

    def __init__(self, serving: Serving, keys: SpokenKeys | None = None) -> None:
        self._serving, self._keys = serving, keys
        self.threads: LeasesInStore | None = None
        """Leases of threads; ``None``: there is no store for them."""
        self._in_order = ThreadPoolExecutor(1, "orla-thread-leases")
        self._at_once: Mapping[str, Callable[[LinkCaller, Flat], Any]] = {
            "statistics": self._statistics,
            "prioritize": self._prioritize,
            "move": self._move,
            "pause": self._pause,
            "resume": self._resume,
            "set_policy": self._set_policy,
            "set_limit": self._set_limit,
            "limits": self._limits,
            "ahead": self._ahead,
            "feedback": self._feedback,
            "resident": self._resident,
            "key": self._key,
        }
        self._in_time: Mapping[str, Callable[[LinkCaller, Flat], Any]] = {
            "drain": self._drain,
            "thread": self._thread,
        }

    def answer(
        self, caller: LinkCaller, request: Request, send: Callable[[Message], None], tasks: set[asyncio.Task[None]]
    ) -> None:
        """Answer a request, at once or later; *tasks* holds what is under way for its connection."""
        changes = request.what in CHANGING or (request.what == "limits" and "limits" in request.more)
        if changes and KeyScope.CONTROL not in caller.scopes:
            fault = f"{request.what}: this link's key changes nothing here; make one with --scope control too"
            send(RequestDone(request.number, fault, ConfigError.__name__))
            return
        if (handle := self._at_once.get(request.what)) is not None:
            send(_done(request.number, partial(handle, caller, request.more)))
            return
        begin = self._in_time.get(request.what)
        if begin is None or len(tasks) >= (MOST_THREADS if request.what == "thread" else MOST_OPEN):
            known = (*self._at_once, *self._in_time)
            fault = "too many requests are under way" if begin else (
                f"unknown request {shown(request.what)}{did_you_mean(request.what, known)}"
            )  # fmt: skip
            send(RequestDone(request.number, fault, ConfigError.__name__))
            return
        task = asyncio.get_running_loop().create_task(
            _in_time(request.number, partial(begin, caller, request.more), send)
        )
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    # Looking

    def _statistics(self, caller: LinkCaller, more: Flat) -> Flat:
        return flat_statistics(self._serving.statistics())

    def _ahead(self, caller: LinkCaller, more: Flat) -> Flat | None:
        ahead = self._serving.progress.ahead(_text(more, "run"))
        if ahead is None:
            return None
        return {"stages": dict(ahead.stages), "backends": dict(ahead.backends), "remaining_s": ahead.remaining_s}

    def _resident(self, caller: LinkCaller, more: Flat) -> int:
        """Return what of a prompt is believed to be in a backend's cache, for a mapper in the replica."""
        hashes = numbers(_list(more, "hashes"), "hashes", 2**64 - 1)
        chars = numbers(_list(more, "chars"), "chars", MOST_CHARS)
        if len(hashes) != len(chars):
            raise LinkBroken("a prompt whose hashes and lengths differ in number")
        tenant = tenant_within(caller, _text(more, "tenant") if more.get("tenant") else None)
        ask = FlatAsk(
            "auto", UNSENT, tools=more.get("tools") is True, hashes=hashes, chars=chars, text_chars=sum(chars)
        )
        workflow = workflow_key(workflow_of(_text(more, "workflow")), tenant)
        said = Hints(tenant=tenant)
        call = Call("", Identity(workflow), ask, said, said, self._serving.clock())
        return resident_tokens(self._scheduler(_text(more, "backend")), call)

    def _key(self, caller: LinkCaller, more: Flat) -> Flat:
        """Return what a gateway must know of a key that it was sent, by its hash."""
        speaks_for_others(caller)
        return {"any": False, "key": None} if self._keys is None else self._keys.told(_text(more, "sha256"))

    # Changing

    def _prioritize(self, caller: LinkCaller, more: Flat) -> bool:
        priority = more.get("priority")
        if isinstance(priority, bool) or not isinstance(priority, int | float):
            raise ConfigError(f"priority must be a number, got {shown(priority)}")
        number("priority", priority)
        tenant = _text(more, "tenant") if more.get("tenant") else None
        if tenant is not None or caller.tenants is not None:
            tenant = tenant_within(caller, tenant)
        return self._serving.steering.prioritize(_text(more, "run"), priority, tenant)

    def _move(self, caller: LinkCaller, more: Flat) -> bool:
        tenant = _text(more, "tenant") if more.get("tenant") else None
        if tenant is not None or caller.tenants is not None:
            tenant = tenant_within(caller, tenant)
        backend = None if more.get("backend") is None else _text(more, "backend")
        if backend is not None and not allows(caller.backends, backend):
            raise ConfigError(f"this key may not use backend {shown(backend)}")
        return self._serving.steering.move(_text(more, "workflow"), backend, tenant)

    def _pause(self, caller: LinkCaller, more: Flat) -> None:
        self._serving.steering.pause(_text(more, "backend"))

    def _resume(self, caller: LinkCaller, more: Flat) -> None:
        self._serving.steering.resume(_text(more, "backend"))

    def _set_policy(self, caller: LinkCaller, more: Flat) -> None:
        stage, request = _names(more, "stage_policy"), _names(more, "request_policy")
        backend = _text(more, "backend") if more.get("backend") is not None else None
        self._serving.steering.set_policy(stage, request, backend)

    def _set_limit(self, caller: LinkCaller, more: Flat) -> None:
        self._serving.steering.set_limit(
            _text(more, "backend"), more.get("max_concurrency", KEEP), more.get("capacity", KEEP)
        )

    def _limits(self, caller: LinkCaller, more: Flat) -> Flat:
        if "limits" in more:
            self._serving.limits.shared = Limits.of(more["limits"])
        return flat_limits(self._serving.limits.shared)

    def _feedback(self, caller: LinkCaller, more: Flat) -> None:
        score = more.get("score")
        if isinstance(score, bool) or not isinstance(score, int | float):
            raise ConfigError(f"a score must be a number from 0 to 1, got {shown(score)}")
        self._serving.feedback(_text(more, "record"), float(score))

    # What takes time

    async def _drain(self, caller: LinkCaller, more: Flat) -> bool:
        timeout_s = more.get("timeout_s")
        if timeout_s is not None and (isinstance(timeout_s, bool) or not isinstance(timeout_s, int | float)):
            raise ConfigError(f"timeout_s must be 0 or more seconds, or None: for ever; got {shown(timeout_s)}")
        drained: bool = await adrive(self._serving.steering.drain(_text(more, "backend"), timeout_s))
        return drained

    async def _thread(self, caller: LinkCaller, more: Flat) -> Flat | None:
        """Take, renew or give back the lease of a thread; in the order in which it was asked for, beside the loop."""
        if self.threads is None:
            raise ConfigError("this server has no store that leases of threads could be in")
        tenant = _text(more, "tenant") if more.get("tenant") else None
        if tenant is not None or caller.tenants is not None:
            tenant = tenant_within(caller, tenant)
        thread, owner = _text(more, "thread"), more.get("owner")
        named(thread, "a thread's id")
        name, says = lease_name(tenant, thread), read_owner(owner if isinstance(owner, Mapping) else {})
        if not says.holder:
            raise ConfigError("owner: a lease needs a holder")
        for each in (says.holder, says.host, says.run):  # they are kept in the store
            named(each, "what is said of a thread's owner")
        threads, what, ttl_s, epoch = self.threads, _text(more, "what"), more.get("ttl_s"), more.get("epoch")
        if what == "give_back":
            await self._ordered(threads.give_back, name, says)
            return None
        if isinstance(ttl_s, bool) or not isinstance(ttl_s, int | float) or not 0 < ttl_s <= MOST_LEASE_S:
            raise ConfigError(f"ttl_s must be seconds above 0, {MOST_LEASE_S:g} at most, got {shown(ttl_s)}")
        if what == "take":
            gone = _text(more, "gone") if more.get("gone") else ""
            return flat_answer(await self._ordered(threads.take, name, says, ttl_s, gone))
        if what != "renew" or not isinstance(epoch, int):
            raise ConfigError(f"what: take, renew (with an epoch) or give_back, got {shown(what)}")
        return flat_answer(await self._ordered(threads.renew, name, says, ttl_s, epoch))

    async def _ordered(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return await asyncio.get_running_loop().run_in_executor(self._in_order, call, *args)
        except StoreUnavailable as error:  # a replica waits for it as for a core
            raise BackendUnavailable(f"the server's store does not answer: {error}") from error

    def _scheduler(self, backend: str) -> BackendScheduler:
        schedulers = self._serving.schedulers
        if backend not in schedulers:
            raise ConfigError(f"unknown backend {shown(backend)}{did_you_mean(backend, schedulers)}")
        return schedulers[backend]


def _done(request: int, handle: Callable[[], Any]) -> RequestDone:
    try:
        return RequestDone(request, handle())
    except (OrlaError, TypeError, ValueError) as error:  # a peer's values may have any type
        return _refused(request, error)


async def _in_time(request: int, begin: Callable[[], Any], send: Callable[[Message], None]) -> None:
    try:
        done = RequestDone(request, await begin())
    except Exception as error:  # noqa: BLE001 - it is the asking replica's, whatever the engine or a mapper raised
        done = _refused(request, error)
    send(done)


def _refused(request: int, error: Exception) -> RequestDone:
    kind = type(error).__name__ if isinstance(error, OrlaError) else ConfigError.__name__
    text = str(error.args[0]) if isinstance(error, RecordUnknown) and error.args else str(error)
    return RequestDone(request, text, kind)


def _text(more: Flat, name: str) -> str:
    value = more.get(name)
    if not isinstance(value, str):
        raise ConfigError(f"{name} must be a text, got {shown(value)}")
    return value


def _list(more: Flat, name: str) -> Sequence[Any]:
    value = more.get(name)
    if not isinstance(value, list):
        raise ConfigError(f"{name} must be a list, got {shown(value)}")
    return value


def _names(more: Flat, name: str) -> Any:
    """Return policies by name; an object of a class cannot have come over a link."""
    value = more.get(name)
    entries = value.values() if isinstance(value, Mapping) else (value,)
    if value is not None and not all(isinstance(each, str) for each in entries):
        raise ConfigError(f"{name} must be a policy's name, or a table of names, got {shown(value)}")
    return value
