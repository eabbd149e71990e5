"""What a server is made of, opened in order before its loop runs: its store, its socket, its core."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from orla_lg.errors import BackendUnavailable
from orla_lg.orla import Orla
from orla_lg.serve.access.keys import PREFIX
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.posted.book import key_of
from orla_lg.serve.posted.items import PostedKind
from orla_lg.serve.recognition import refuse_our_own
from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.store.opening import store_at
from orla_lg.serve.store.scoped import ScopedStore
from orla_lg.serve.store.store import MemoryStore, Store


class ServerParts(NamedTuple):
    """What a server is made of, and what was found on the way."""

    store: Store
    opened: Listening
    orla: Orla
    silent: Mapping[str, BackendUnavailable | None]
    """By backend: why it was not reached."""
    keys: int
    """How many the store has, of callers."""
    posted: int
    """How many backends the store has."""


def open_parts(chosen: ServeSettings, ending: contextlib.ExitStack, *, in_memory: bool = False) -> ServerParts:
    """Open what a server is made of, and return it; *ending* closes it.

    Raises:
        ConfigError: What is wrong with the settings, the store or the port.
    """
    store = opened_store(chosen, in_memory=in_memory)
    ending.callback(getattr(store, "close", int))
    own = ScopedStore(store, chosen.table.pool)
    keys, posted = len(store.scan(PREFIX)), len(own.scan(key_of(PostedKind.BACKEND, "")))
    chosen.check(has_keys=bool(keys))
    opened = Listening(chosen.listen)
    ending.callback(opened.close)
    with ThreadPoolExecutor() as asking:
        list(asking.map(refuse_our_own, chosen.core.backends))
    orla = Orla.from_settings(chosen.core, may_be_empty=True)
    ending.callback(orla.close)
    return ServerParts(store, opened, orla, orla.connect(), keys, posted)


def opened_store(settings: ServeSettings, *, in_memory: bool = False) -> Store:
    """Return the store that a server is started with.

    Raises:
        ConfigError: It cannot be used.
    """
    if in_memory:
        return MemoryStore()
    table, where = settings.table, settings.where("store")
    return store_at(table.store, where, password_env=table.store_password_env, plain_text=table.store_plain_text)
