"""Which store a server has: a file on its machine, one that several machines reach, or none that outlives it."""

from __future__ import annotations

from pathlib import Path

from orla_lg.errors import ConfigError
from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.store.sqlite import SqliteStore, default_file
from orla_lg.serve.store.store import MemoryStore, Store

REDIS_SCHEMES = ("redis://", "rediss://", "redis+unix://")


def is_shared(where: str | None) -> bool:
    """Whether a store is one that several machines reach: a URL, and no file."""
    return where is not None and where.startswith(REDIS_SCHEMES)


def opened_store(settings: ServeSettings, *, in_memory: bool = False) -> Store:
    """Return the store that a server is started with.

    Raises:
        ConfigError: It cannot be used.
    """
    if in_memory:
        return MemoryStore()
    return store_at(settings.table.store, settings.where("store"))


def store_at(said: str | None, where: str, *, durable: bool = False) -> Store:
    """Return the store that a path or a URL names; ``None``: the file in this user's state folder.

    Args:
        said: What names it.
        where: What messages begin with: the key of the configuration, or the option.
        durable: Each write is on the disk when it returns.

    Raises:
        ConfigError: It cannot be used.
    """
    if said is not None and is_shared(said):
        raise ConfigError(f"{where}: {said} cannot be used yet")
    return SqliteStore(default_file() if said is None else Path(said), where=where, durable=durable)
