"""Which store a server has: a file on its machine, one that several machines reach, or none that outlives it."""

from __future__ import annotations

from pathlib import Path

from orla_lg.link.redis_keys import RedisAddress, is_shared
from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.store.redis import ANSWER_S, RedisStore
from orla_lg.serve.store.sqlite import BUSY_S, SqliteStore, default_file
from orla_lg.serve.store.store import MemoryStore, Store


def opened_store(settings: ServeSettings, *, in_memory: bool = False) -> Store:
    """Return the store that a server is started with.

    Raises:
        ConfigError: It cannot be used.
    """
    if in_memory:
        return MemoryStore()
    return store_at(settings.table.store, settings.where("store"))


def store_at(
    said: str | None, where: str, *, durable: bool = False, patience_s: float | None = None
) -> SqliteStore | RedisStore:
    """Return the store that a path or a URL names; ``None``: the file in this user's state folder.

    Args:
        said: What names it.
        where: What messages begin with: the key of the configuration, or the option.
        durable: Each write to a file is on the disk when it returns; a server has its own rule for that.
        patience_s: How long a step may take; ``None``: as long as a server's loop can wait.

    Raises:
        ConfigError: It cannot be used.
        StoreUnavailable: It does not answer.
    """
    if is_shared(said):
        return RedisStore(RedisAddress.parse(said, where), where=where, answer_s=patience_s or ANSWER_S)
    file = default_file() if said is None else Path(said)
    return SqliteStore(file, where=where, durable=durable, busy_s=patience_s or BUSY_S)
