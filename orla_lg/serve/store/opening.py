"""Which store a server has: a file on its machine, one that several machines reach, or none that outlives it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orla_lg.errors import ConfigError
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
    table, where = settings.table, settings.where("store")
    return store_at(table.store, where, password_env=table.store_password_env, plain_text=table.store_plain_text)


def store_at(
    said: str | None,
    where: str,
    *,
    durable: bool = False,
    patience_s: float | None = None,
    password_env: str | None = None,
    plain_text: bool = False,
) -> SqliteStore | RedisStore:
    """Return the store that a path or a URL names; ``None``: the file in this user's state folder.

    Args:
        said: What names it.
        where: What messages begin with: the key of the configuration, or the option.
        durable: Each write to a file is on the disk when it returns; a server has its own rule for that.
        patience_s: How long a step may take; ``None``: as long as a server's loop can wait.
        password_env: The variable that has the password of a server.
        plain_text: Whether a password may go to another machine in plain text.

    Raises:
        ConfigError: It cannot be used.
        StoreUnavailable: It does not answer.
    """
    if is_shared(said):
        address = RedisAddress.parse(said, where)
        given: dict[str, Any] = {} if password_env is None else {"password": _password(password_env, where)}
        if (given or address.has_password) and not (address.is_believed or plain_text):
            raise ConfigError(
                f"{where}: the password of {address.text} would go there in plain text, or to a server that no "
                "certificate shows to be the right one: rediss:// speaks TLS; within a private network [serve] "
                "store_plain_text = true"
            )
        return RedisStore(address, where=where, answer_s=patience_s or ANSWER_S, **given)
    file = default_file() if said is None else Path(said)
    return SqliteStore(file, where=where, durable=durable, busy_s=patience_s or BUSY_S)


def _password(variable: str, where: str) -> str:
    found = os.environ.get(variable)
    if not found:
        raise ConfigError(f"{where}: the variable {variable} (serve.store_password_env) is not set, or empty")
    return found
