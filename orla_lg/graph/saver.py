"""OrlaSaver: a checkpointer that is its inner one in every respect, and tells Orla two things.

A checkpointer learns what no callback says: that a thread was deleted, and, before the next step
starts, which stages come next (LangGraph stores a finished task's writes, and the channels written
are named after the nodes that they start). ``OrlaSaver`` puts any ``BaseCheckpointSaver`` inside,
forwards everything, and signals these two.

What an ``OrlaSaver`` does is what its inner *instance* does: each method is looked up there when it is
used, so a saver that delegates to another (``__getattr__``, a proxy, a mock) or whose methods were set
on the instance works as it does bare. What an ``OrlaSaver`` can is found out from its *class*: LangGraph's
conformance suite asks which methods that overrides. So each inner saver gets a class that shows what this
saver answers. Only calls from outside pass through here: an inner saver whose async method calls its
sync twin calls its own, and one event stays one signal.
"""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, cast, final

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver

from orla_lg.arguments import answering
from orla_lg.errors import ConfigError
from orla_lg.graph.threads.leases import ThreadLeases
from orla_lg.graph.threads.opening import LEASED, leases_of
from orla_lg.graph.threads.waiting import WhenBusy

__all__ = ["CheckpointSignals", "OrlaSaver"]

Saver = BaseCheckpointSaver[Any]
Method = Callable[..., Any]

_log = logging.getLogger(__name__)

_BRANCH_TO = "branch:to:"
"""What LangGraph puts before a node's name to name the channel that starts it."""


class CheckpointSignals(Protocol):
    """What a saver tells: synchronous, quick, once per event."""

    def thread_deleted(self, thread_id: str) -> None:
        """Take note that all checkpoints of *thread_id* are gone.

        A saver that was given a tenant names it as ``tenant=``.
        """

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Sequence[str]) -> None:
        """Take note that a finished task in *checkpoint_ns* starts *stages* next."""


@answering
@final
class OrlaSaver(BaseCheckpointSaver[Any]):
    """A checkpointer that acts as *inner* and signals to Orla.

    Args:
        orla: an ``Orla``, or any object with the methods of ``CheckpointSignals``.
        inner: the saver that stores; any ``BaseCheckpointSaver``.
        tenant: the tenant of the threads that it keeps: deleting one ends that tenant's workflow. ``None``: the
            tenant that the running node's run belongs to, outside any run none.
        thread_lease_s: For how long a run owns the thread that it reads, renewed while it lasts (docs/threads.md):
            no other run may read the thread to go on with it meanwhile, and what one that lost it writes late is
            refused. ``None``: a thread has no owner.
        busy: What becomes of a run on a thread that another run owns: ``"fail"`` ends it with ``ThreadBusy``,
            ``"wait"`` waits, for *thread_lease_s* or the run's deadline at most.
        store: Where leases are kept: a path, or a URL of Redis. Without it the database of *inner*, where that is
            SQLite or PostgreSQL, else the server's of ``Orla.remote``.

    Raises:
        ConfigError: *inner* is no saver, *orla* takes no signals, *tenant* is no name, or there is no place for
            leases.
    """

    inner: Saver
    _signals: CheckpointSignals
    _tenant: str | None
    _leases: ThreadLeases | None

    # All is done in __new__: it may return *inner* itself, which __init__ must then leave as it is.
    def __new__(
        cls, orla: object, inner: Saver, tenant: str | None = None, *, thread_lease_s: float | None = None,
        busy: WhenBusy = "fail", store: Any = None,
    ) -> OrlaSaver:  # fmt: skip
        """Return *inner* within one layer of this *orla*, of the class made for its type."""
        _check_saver(inner)
        if tenant is not None and not isinstance(tenant, str):
            raise ConfigError(f"OrlaSaver(orla, inner, tenant): tenant must be a name, got {tenant!r}")
        signals = _signals_of(orla)
        bare = inner.inner if isinstance(inner, OrlaSaver) and inner._signals is signals else inner
        return _layer(signals, inner, tenant, leases_of(signals, bare, tenant, thread_lease_s, busy, store))

    def __init__(
        self, orla: object, inner: Saver, tenant: str | None = None, *, thread_lease_s: float | None = None,
        busy: WhenBusy = "fail", store: Any = None,
    ) -> None: ...  # fmt: skip

    def __repr__(self) -> str:
        return f"OrlaSaver(inner={self.inner!r})"

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # asked before __new__ has set it: there is nothing to forward to
            raise AttributeError(name)
        return getattr(self.inner, name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(self.inner, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.inner, name)

    def with_allowlist(self, extra_allowlist: Collection[tuple[str, ...]]) -> OrlaSaver:
        """Return the inner saver's clone with this allowlist, telling the same Orla."""
        return self._around(self.inner.with_allowlist(extra_allowlist))

    def __copy__(self) -> OrlaSaver:
        return self._around(copy.copy(self.inner))

    def __deepcopy__(self, memo: dict[int, Any]) -> OrlaSaver:
        return self._around(copy.deepcopy(self.inner, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        # An Orla belongs to its process: what travels is the inner saver alone.
        return _itself, (self.inner,)

    def _around(self, inner: Saver) -> OrlaSaver:
        return self if inner is self.inner else _layer(self._signals, inner, self._tenant, self._leases)

    def _tell(self, event: Method | None, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        if event is not None:
            with _Harmless():
                event(self._signals, self._tenant, *args, **kwargs)


def _signals_of(orla: object) -> CheckpointSignals:
    signals = getattr(orla, "signals", orla)
    if all(callable(getattr(signals, name, None)) for name in ("thread_deleted", "stages_next")):
        return cast(CheckpointSignals, signals)
    raise ConfigError(
        f"OrlaSaver(orla, inner): orla is {type(orla).__name__!r}, which takes no signals; "
        f"give it an Orla, or an object with the methods thread_deleted and stages_next"
    )


def _check_saver(inner: object) -> None:
    if not isinstance(inner, BaseCheckpointSaver):
        raise ConfigError(
            f"OrlaSaver(orla, inner): inner is {type(inner).__name__!r}, not a BaseCheckpointSaver; "
            f"give it a saver's instance (from_conn_string returns a context manager: pass what it yields)"
        )


def _layer(
    signals: CheckpointSignals, inner: Saver, tenant: str | None, leases: ThreadLeases | None = None
) -> OrlaSaver:
    known = next((layer for layer in _layers(inner) if layer._signals is signals), None)
    if known is not None and leases is None and tenant in (None, known._tenant):
        return cast(OrlaSaver, inner)
    if known is inner:  # another tenant's, or with leases: one layer tells, of one tenant
        inner, leases, tenant = known.inner, leases or known._leases, known._tenant if tenant is None else tenant
    saver = object.__new__(_class_for(inner))
    object.__setattr__(saver, "inner", inner)
    object.__setattr__(saver, "_signals", signals)
    object.__setattr__(saver, "_tenant", tenant)
    object.__setattr__(saver, "_leases", leases)
    return saver


def _itself(saver: Saver) -> Saver:
    return saver


def _layers(saver: object) -> Iterator[OrlaSaver]:
    while isinstance(saver, OrlaSaver):
        yield saver
        saver = saver.inner


# ── the class for one kind of inner saver ────────────────────────────────────────────────────────────

_METHODS: Mapping[str, Method] = {
    name: base
    for name, base in vars(BaseCheckpointSaver).items()
    if inspect.isfunction(base) and not name.startswith("_") and name not in vars(OrlaSaver)
}


def _class_for(inner: Saver) -> type[OrlaSaver]:
    """Return the subclass of OrlaSaver that shows as overridden what *inner* answers, and no more."""
    # mypy looks for the hash of a class among the methods of its instances.
    answered = frozenset(name for name in _METHODS if _answers(inner, name))
    return _class_around(type(inner), answered)  # type: ignore[arg-type]


def _answers(inner: Saver, name: str) -> bool:
    """Return whether *inner* does more in a method than the base class: by its type, on its own, or by delegation."""
    base = _METHODS[name]
    if getattr(type(inner), name, base) is not base:
        return True
    try:
        method = getattr(inner, name)
    except Exception:  # noqa: BLE001 - a delegate that is not there yet; its user's code may raise anything
        return False
    return getattr(method, "__func__", None) is not base


# Neither the key nor the class refers to an instance, so a saver that is dropped is freed.
@functools.lru_cache(maxsize=128)
def _class_around(inner_type: type[Saver], answered: frozenset[str]) -> type[OrlaSaver]:
    members: dict[str, Any] = {"__module__": __name__, "__doc__": inner_type.__doc__}
    for name in vars(BaseCheckpointSaver):
        if name in _METHODS:
            members[name] = _Forwarded(name, _shown(inner_type, name) if name in answered else _METHODS[name])
        elif not (name.startswith("_") or name in vars(OrlaSaver)):
            members[name] = _forwarded_attribute(name)
    members |= {name: enter for name, enter in _CONTEXT.items() if hasattr(inner_type, name)}
    # type() does not know that the result is a subclass; OrlaSaver is final for all other code.
    return cast(type[OrlaSaver], type(f"OrlaSaver[{inner_type.__name__}]", (OrlaSaver,), members))


def _forwarded_attribute(name: str) -> property:
    return property(lambda self: getattr(self.inner, name))


def _shown(inner_type: type[Saver], name: str) -> Method:
    """Return what the class shows for an answered method: the signature of the type's own, else the base's."""
    base, own = _METHODS[name], getattr(inner_type, name, None)

    @functools.wraps(own if callable(own) else base)
    def method(self: OrlaSaver, *args: Any, **kwargs: Any) -> Any:
        return getattr(self, name)(*args, **kwargs)

    return method


class _Forwarded:
    """A method of an OrlaSaver: the class shows *shown*, an instance gives the inner saver's, with its signals."""

    def __init__(self, name: str, shown: Method) -> None:
        self._name, self._shown = name, shown
        self._before, self._after, self._leased = _BEFORE.get(name), _AFTER.get(name), LEASED.get(name)
        # The base class says which methods are awaited; an inner one may be wrapped beyond recognition.
        self._forward = _signalling_awaited if inspect.iscoroutinefunction(_METHODS[name]) else _signalling

    def __get__(self, saver: OrlaSaver | None, owner: type[OrlaSaver]) -> Method:
        if saver is None:
            return self._shown
        method: Method = getattr(saver.inner, self._name)
        if self._leased is not None and saver._leases is not None:
            method = self._leased(saver._leases, saver.inner, self._name, method)
        if self._before is None and self._after is None:
            return method
        return self._forward(saver, method, self._before, self._after)


# functools.wraps keeps the inner signature: LangGraph looks for `task_path` in it.
def _signalling(saver: OrlaSaver, method: Method, before: Method | None, after: Method | None) -> Method:
    @functools.wraps(method)
    def forward(*args: Any, **kwargs: Any) -> Any:
        saver._tell(before, args, kwargs)
        result = method(*args, **kwargs)
        saver._tell(after, args, kwargs)
        return result

    return forward


def _signalling_awaited(saver: OrlaSaver, method: Method, before: Method | None, after: Method | None) -> Method:
    @functools.wraps(method)
    async def forward(*args: Any, **kwargs: Any) -> Any:
        saver._tell(before, args, kwargs)
        result = await method(*args, **kwargs)
        saver._tell(after, args, kwargs)
        return result

    return forward


# ── `with` and `async with`, for inner savers that are context managers ──────────────────────────────


def _enter(self: OrlaSaver) -> Any:
    return _entered(self, type(self.inner).__enter__(self.inner))  # type: ignore[attr-defined]


async def _aenter(self: OrlaSaver) -> Any:
    return _entered(self, await type(self.inner).__aenter__(self.inner))  # type: ignore[attr-defined]


def _entered(self: OrlaSaver, value: Any) -> Any:
    return self._around(value) if isinstance(value, BaseCheckpointSaver) else value


def _exit(self: OrlaSaver, *raised: Any) -> Any:
    return type(self.inner).__exit__(self.inner, *raised)  # type: ignore[attr-defined]


async def _aexit(self: OrlaSaver, *raised: Any) -> Any:
    return await type(self.inner).__aexit__(self.inner, *raised)  # type: ignore[attr-defined]


_CONTEXT: Mapping[str, Method] = {
    "__enter__": _enter,
    "__exit__": _exit,
    "__aenter__": _aenter,
    "__aexit__": _aexit,
}


# ── what is reported ─────────────────────────────────────────────────────────────────────────────────────


def _stages_next(
    signals: CheckpointSignals,
    tenant: str | None,
    config: RunnableConfig,
    writes: Sequence[tuple[str, Any]],
    *_: Any,
    **__: Any,
) -> None:
    channels = dict.fromkeys(channel for channel, _value in writes)
    stages = [name.removeprefix(_BRANCH_TO) for name in channels if name.startswith(_BRANCH_TO)]
    if stages:
        where = config.get("configurable", {})
        thread_id = where.get("thread_id")
        signals.stages_next(None if thread_id is None else str(thread_id), where.get("checkpoint_ns", ""), stages)


def _thread_deleted(signals: CheckpointSignals, tenant: str | None, thread_id: object) -> None:
    if tenant is None:
        signals.thread_deleted(str(thread_id))
    else:  # signals of others' making need not know of tenants
        signals.thread_deleted(str(thread_id), tenant=tenant)  # type: ignore[call-arg]


def _threads_pruned(
    signals: CheckpointSignals, tenant: str | None, thread_ids: Sequence[object], strategy: str = "keep_latest"
) -> None:
    if strategy == "delete":  # nothing is kept: deleting a thread by another name
        for thread_id in thread_ids:
            _thread_deleted(signals, tenant, thread_id)


# The next stages are a fact of the graph, not of the storage, and worth most before the next step
# starts: they are reported first. A deletion is reported once it has succeeded.
_BEFORE: Mapping[str, Method] = {"put_writes": _stages_next, "aput_writes": _stages_next}
_AFTER: Mapping[str, Method] = {
    "delete_thread": _thread_deleted,
    "adelete_thread": _thread_deleted,
    "prune": _threads_pruned,
    "aprune": _threads_pruned,
}


class _Harmless:
    """Logs what a signal raises and goes on: a fault of ours must not lose somebody's checkpoint."""

    def __enter__(self) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if not isinstance(error, Exception):
            return False
        _log.warning("a checkpoint signal failed; the checkpoint itself is not affected", exc_info=error)
        return True
