"""The store that a path or a URL names: a file on this machine, or one that several machines reach.

What reads a configuration is not imported for it: commands that only open a store start without.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from orla_lg.errors import ConfigError
from orla_lg.link.redis_keys import RedisAddress, is_shared
from orla_lg.serve.store.redis import RedisStore
from orla_lg.serve.store.redis_line import ANSWER_S
from orla_lg.serve.store.sqlite import BUSY_S, SqliteStore, default_file

PASSWORD = "ORLA_STORE_PASSWORD"
"""The variable that has a store's password where ``[serve] store_password_env`` names no other one."""


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
        plain_text: Whether another machine may be asked in plain text.

    Raises:
        ConfigError: It cannot be used.
        StoreUnavailable: It does not answer.
    """
    if is_shared(said):
        address = RedisAddress.parse(said, where)
        if not (address.is_believed or plain_text):
            raise ConfigError(
                f"{where}: what {address.text} is asked, a password with it, would go there in plain text, or to a "
                "server that no certificate shows to be the right one: rediss:// speaks TLS; within a private "
                "network [serve] store_plain_text = true"
            )
        given: dict[str, Any] = {} if (password := _password(password_env, where)) is None else {"password": password}
        return RedisStore(address, where=where, answer_s=patience_s or ANSWER_S, **given)
    file = default_file() if said is None else Path(said)
    return SqliteStore(file, where=where, durable=durable, busy_s=patience_s or BUSY_S)


def _password(variable: str | None, where: str) -> str | None:
    """Return the password in a variable; ``None``: none is named, and the usual one is not set."""
    found = os.environ.get(variable or PASSWORD)
    if variable is not None and not found:
        raise ConfigError(f"{where}: the variable {variable} (serve.store_password_env) is not set, or empty")
    return found or None
