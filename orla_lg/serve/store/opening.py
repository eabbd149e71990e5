"""Which store a server has: a file on its machine, one that several machines reach, or none that outlives it."""

from __future__ import annotations

from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.store.named import PASSWORD, store_at
from orla_lg.serve.store.store import MemoryStore, Store

__all__ = ["PASSWORD", "opened_store", "store_at"]


def opened_store(settings: ServeSettings, *, in_memory: bool = False) -> Store:
    """Return the store that a server is started with.

    Raises:
        ConfigError: It cannot be used.
    """
    if in_memory:
        return MemoryStore()
    table, where = settings.table, settings.where("store")
    return store_at(table.store, where, password_env=table.store_password_env, plain_text=table.store_plain_text)
