"""What an ``OrlaSaver`` is given of thread leases: where they are kept, and the methods that heed them."""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from orla_lg.core.steps import adrive, drive
from orla_lg.errors import ConfigError, shown
from orla_lg.graph.threads.databases import database_registry
from orla_lg.graph.threads.leases import ThreadLeases
from orla_lg.graph.threads.registries import LeaseRegistry, LinkRegistry, StoreRegistry
from orla_lg.graph.threads.waiting import WhenBusy, checked_terms
from orla_lg.link.requests import CoreRequests

Method = Callable[..., Any]


def leases_of(
    signals: Any, inner: Any, tenant: str | None, thread_lease_s: float | None, busy: WhenBusy, store: Any
) -> ThreadLeases | None:
    """Return the leases that a saver is to heed; ``None``: threads have no owner.

    Raises:
        ConfigError: An argument is wrong, or there is no place for leases.
    """
    if thread_lease_s is None:
        if store is not None or busy != "fail":
            raise ConfigError(
                "OrlaSaver(..., busy, store) are of leases on threads: give thread_lease_s=30 with them, or leave "
                "them out"
            )
        return None
    checked_terms(thread_lease_s, busy)
    core = getattr(signals, "core", None)
    if getattr(core, "disabled", False):
        return None
    return ThreadLeases(_registry(core, inner, store), thread_lease_s, busy, tenant)


def _registry(core: Any, inner: Any, store: Any) -> LeaseRegistry:
    if store is not None:
        return _in_store(store)
    registry: LeaseRegistry | None = database_registry(inner)
    if registry is not None:
        return registry
    serving = getattr(core, "serving", None)
    # The store is common to all cores that a replica has a link to: the one that it was told of first is asked.
    side = getattr(getattr(serving, "cores", None), "home", serving)
    if isinstance(requests := getattr(side, "requests", None), CoreRequests):
        return LinkRegistry(requests)
    raise ConfigError(
        f"OrlaSaver(..., thread_lease_s): {type(inner).__name__} has no database that leases could be in; name a "
        "store, store='/PATH/threads.db' or 'redis://HOST', or take Orla.remote, whose server has one"
    )


def _in_store(store: Any) -> StoreRegistry:
    if isinstance(store, str | os.PathLike):
        # The stores are the server's, which stands above: one is made by name, as a user's own object is.
        store_at = import_module("orla_lg.serve.store.opening").store_at
        opens = partial(store_at, os.fspath(store), "OrlaSaver(..., store)")
        opened = opens()
        registry = StoreRegistry(opened, opens)
        if hasattr(opened, "close"):
            weakref.finalize(registry, opened.close)
        return registry
    if all(callable(getattr(store, name, None)) for name in ("get", "put", "lease")):
        return StoreRegistry(store)
    raise ConfigError(
        f"OrlaSaver(..., store): give a path, a redis:// URL or an object with get, put and lease, got {shown(store)}"
    )


def _reads(leases: ThreadLeases, inner: Any, name: str, method: Method) -> Method:
    @functools.wraps(method)
    def read(*args: Any, **kwargs: Any) -> Any:
        drive(leases.read(args[0] if args else kwargs["config"]))
        return method(*args, **kwargs)

    return read


def _areads(leases: ThreadLeases, inner: Any, name: str, method: Method) -> Method:
    @functools.wraps(method)
    async def read(*args: Any, **kwargs: Any) -> Any:
        await adrive(leases.read(args[0] if args else kwargs["config"]))
        return await method(*args, **kwargs)

    return read


def _writes(leases: ThreadLeases, inner: Any, name: str, method: Method) -> Method:
    @functools.wraps(method)
    def write(*args: Any, **kwargs: Any) -> Any:
        return drive(leases.write(inner, name, args, kwargs))

    return write


def _awrites(leases: ThreadLeases, inner: Any, name: str, method: Method) -> Method:
    @functools.wraps(method)
    async def write(*args: Any, **kwargs: Any) -> Any:
        return await adrive(leases.write(inner, name, args, kwargs))

    return write


LEASED: Mapping[str, Callable[[ThreadLeases, Any, str, Method], Method]] = {
    "get_tuple": _reads, "aget_tuple": _areads,
    "put": _writes, "put_writes": _writes, "aput": _awrites, "aput_writes": _awrites,
}  # fmt: skip
"""By method of a saver, what it is where threads have an owner."""
