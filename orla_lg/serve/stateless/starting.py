"""The start of ``orla-lg serve --gateway``: its socket, its link and what is printed of them."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
from collections.abc import Iterator

from orla_lg import config
from orla_lg.config_tables import ServeTable
from orla_lg.errors import ConfigError
from orla_lg.link.redis_directory import are_named
from orla_lg.link.redis_keys import RedisAddress, is_shared, with_password
from orla_lg.link.serving import LinkedServing
from orla_lg.orla import Orla
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.running import LOG_FORMAT
from orla_lg.serve.settings import ServeSettings
from orla_lg.serve.stateless.keys import ANY_KEY
from orla_lg.serve.stateless.server import run
from orla_lg.serve.store.opening import PASSWORD


def core_of(named: str | None, chosen: ServeSettings) -> str:
    """Return where the core of a gateway is: the command line, then ``[serve] core``, then ``ORLA_SERVER``.

    Raises:
        ConfigError: None of them says.
    """
    found = config.server()
    core = named or chosen.table.core or (None if found is None else found.url)
    if core is None:
        raise ConfigError(
            f"--gateway: which core? give --core http://HOST:PORT, [serve] core in the file, or {config.SERVER}"
        )
    return core


def serve_gateway(chosen: ServeSettings, named: str | None, ending: contextlib.ExitStack) -> int:
    """Serve until a signal ends it, and return the exit status.

    Args:
        chosen: What it is started with.
        named: Where the core is, by the command line.
        ending: Ends what was begun.

    Raises:
        ConfigError: Naming what is wrong.
        BackendUnavailable: The core does not answer.
    """
    core = core_of(named, chosen)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)
    opened, orla, has_keys = begin_gateway(chosen, core, ending)
    serving = orla.core.serving
    assert isinstance(serving, LinkedServing)
    before = serving.cores.home.link.places.text

    def started(url: str) -> None:
        print("\n".join(_started(orla, before, url, has_keys=has_keys)), flush=True)

    gc.collect()
    gc.freeze()  # what the imports made stays: the collector need not look through it at every few hundred calls
    return run(chosen, orla, opened, started)


def begin_gateway(chosen: ServeSettings, core: str, ending: contextlib.ExitStack) -> tuple[Listening, Orla, bool]:
    """Open what a gateway is made of, and return it with whether its core has keys; *ending* closes it.

    Raises:
        ConfigError: What is wrong with the settings or the port.
        BackendUnavailable: The core does not answer.
    """
    opened = Listening(chosen.listen)
    ending.callback(opened.close)
    found = config.server()
    key = config.server_key() if found is None or are_named(core, found.url) else None
    orla = Orla.remote(_reached(core, chosen.table), key=key, keep_records=chosen.core.keep_records, control=False)
    ending.callback(orla.close)
    serving = orla.core.serving
    assert isinstance(serving, LinkedServing)
    has_keys = bool(serving.cores.home.requests.ask("key", {"sha256": ANY_KEY}).get("any"))
    chosen.check(has_keys=has_keys)
    return opened, orla, has_keys


def _reached(core: str, table: ServeTable) -> str:
    """Return where the core is; a store that names it is asked with its password, as a core asks it."""
    password = os.environ.get(table.store_password_env or PASSWORD)
    if not password:
        return core
    places = [each.strip() for each in core.split(",")]
    return ",".join(
        with_password(each, password)
        if is_shared(each) and (table.store_plain_text or RedisAddress.parse(each, "core").is_believed)
        else each
        for each in places
    )


def _started(orla: Orla, core: str, url: str, *, has_keys: bool) -> Iterator[str]:
    yield f"orla-lg serve listens at {url}, a gateway before the core at {core}"
    for name, scheduler in orla.core.serving.schedulers.items():
        yield f"  {name}  {scheduler.backend.url}  {scheduler.backend.engine}"
    yield "keys: those of the core, and each call needs one" if has_keys else "keys: none, so no call needs one"
    yield ""
    yield f"OpenAI's clients reach it by base_url={url + '/v1'!r}; graphs go to the core itself"
    yield "Ctrl-C or SIGTERM drains and ends it"
