"""What ``orla-lg serve`` is started with: its command line, ``[serve]`` of ``orla.toml``, and which go together."""

from __future__ import annotations

import ipaddress
import ssl
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from orla_lg import config
from orla_lg.config_file import find_file
from orla_lg.config_pools import POOL_NAME
from orla_lg.config_tables import ServeTable
from orla_lg.core.boundary import checked
from orla_lg.errors import ConfigError, shown
from orla_lg.link.dialing import ServerAddress, addresses
from orla_lg.link.redis_keys import is_shared

DEFAULT_PORT = 8081
"""That of Orla's daemon."""

LOOPBACK = "127.0.0.1"
UNIX = "unix:"


@dataclass(frozen=True, slots=True)
class ListenAddress:
    """Where a server listens: a host and a port, or the path of a Unix socket."""

    host: str = LOOPBACK
    port: int = DEFAULT_PORT
    """0: a free one."""
    path: Path | None = None

    @classmethod
    def parse(cls, where: str, said: str) -> ListenAddress:
        """Read ``HOST:PORT`` or ``unix:PATH``.

        Raises:
            ConfigError: It is neither.
        """
        if said.startswith(UNIX):
            return cls("", 0, checked.path(where, said.removeprefix(UNIX)))
        host, colon, port = said.rpartition(":")
        bare = host.removeprefix("[").removesuffix("]")
        if not (colon and port.isascii() and port.isdecimal() and int(port) < 65_536):
            raise ConfigError(
                f"{where} must be HOST:PORT, as {LOOPBACK}:{DEFAULT_PORT}, or unix:PATH; got {shown(said)}"
            )
        if not bare or not bare.isprintable() or " " in bare or (":" in bare and bare == host):
            right = f"0.0.0.0:{port} is every address of this machine, [::1]:{port} an IPv6 one"
            raise ConfigError(f"{where}: {shown(said)} has no host; {right}")
        return cls(bare, int(port))

    @property
    def is_local(self) -> bool:
        """Whether no other machine reaches it."""
        if self.path is not None or self.host.lower() == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False

    @property
    def is_any(self) -> bool:
        """Whether it is every address of the machine."""
        try:
            return self.path is None and ipaddress.ip_address(self.host).is_unspecified
        except ValueError:
            return False

    def url(self, port: int | None = None, *, tls: bool = False) -> str:
        """Return what clients on this machine reach it by; *port* is the one that was found free."""
        if self.path is not None:
            return f"{UNIX}{self.path}"
        host = LOOPBACK if self.is_any else self.host
        host = f"[{host}]" if ":" in host else host
        return f"{'https' if tls else 'http'}://{host}:{port or self.port}"

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{UNIX}{self.path}" if self.path is not None else f"{host}:{self.port}"


@dataclass(frozen=True, slots=True)
class ServeSettings:
    """What a server is built from."""

    core: config.Settings
    listen: ListenAddress = field(default_factory=ListenAddress)
    table: ServeTable = field(default_factory=lambda: ServeTable.model_validate({}))
    """``[serve]``, with its defaults."""
    options: frozenset[str] = frozenset()
    """Keys of ``[serve]`` that the command line said."""

    @property
    def source(self) -> str:
        """The configuration's file; empty where there is none."""
        return self.core.source

    @property
    def has_tls(self) -> bool:
        """Whether it speaks TLS itself."""
        return self.table.tls_cert is not None

    def where(self, key: str) -> str:
        """Return how a message names a key of ``[serve]``."""
        if key in self.options:
            return f"--{key.replace('_', '-')}"
        return f"{self.source}: serve.{key}" if self.source else key

    def check(self, *, has_keys: bool) -> None:
        """Refuse to be reached from other machines without keys, or in plain text.

        Raises:
            ConfigError: Naming the file and the key.
        """
        if self.has_tls:
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
                    str(self.table.tls_cert), self.table.tls_key, password=_no_password
                )
            except (OSError, ValueError) as error:  # an ``SSLError`` is an ``OSError``
                raise ConfigError(
                    f"{self.where('tls_cert')}: {self.table.tls_cert} with {self.table.tls_key} is no certificate "
                    f"with its key: {error}"
                ) from error
        if self.listen.is_local:
            return
        where = f"{self.where('listen_address')}: {self.listen} is reached from other machines"
        if not has_keys:
            raise ConfigError(f"{where}, and there is no key yet: `orla-lg keys create` makes one")
        if not (self.has_tls or self.table.behind_proxy):
            raise ConfigError(
                f"{where}, and keys and prompts would go there in plain text: give [serve] tls_cert and tls_key, or "
                "behind_proxy = true where a proxy before it speaks TLS"
            )


def addresses_of(table: ServeTable) -> list[ServerAddress]:
    """Return what the server is said to be reached by.

    Raises:
        ConfigError: One is no URL.
    """
    return [each for url in table.advertise for each in addresses(url)]


def _no_password() -> str:
    raise ValueError("the key has a password, which nothing can give here")


def settings(
    file: str | None = None,
    listen_address: str | None = None,
    port: int | None = None,
    store: str | None = None,
    pool: str | None = None,
    *,
    standby: bool = False,
    advertise: Sequence[str] = (),
    reads_file: bool = True,
) -> ServeSettings:
    """Return what to start with: the command line, then ``[serve]``, then defaults.

    ``ORLA_URL`` is not looked at: it means one engine for a process that serves its own graphs.

    Args:
        file: The configuration; ``None``: ``ORLA_CONFIG``, the nearest ``orla.toml``, or none at all.
        listen_address: ``HOST:PORT`` or ``unix:PATH``.
        port: Of the loopback address.
        store: The file of what outlives the process, or the URL of a store that several machines reach.
        pool: That the core decides for.
        standby: It waits for the end of the core that decides.
        advertise: URLs that other processes reach it by.
        reads_file: Whether there is a configuration.

    Raises:
        ConfigError: What is wrong, and where.
    """
    found = (file or find_file()) if reads_file else None
    if pool is not None and POOL_NAME.fullmatch(pool) is None:
        raise ConfigError(f"--pool: {shown(pool)} cannot be the name of a pool; it has letters, digits, and _ . -")
    core = config.load(found, pool=pool or "") if found else config.Settings((), {})
    table = core.serve or ServeTable.model_validate({})
    said: dict[str, object] = {}
    if pool is not None:
        said["pool"] = pool
    if store is not None:
        said["store"] = store if is_shared(store) else str(checked.path("--store", store))
    if advertise:
        said["advertise"] = tuple(advertise)
    if standby:
        said["standby"] = True
    table = table.model_copy(update=said)
    if listen_address is not None:
        listen = ListenAddress.parse("--listen-address", listen_address)
    elif port is not None:
        listen = ListenAddress(port=port)
    elif table.listen_address is not None:
        listen = ListenAddress.parse(f"{core.source}: serve.listen_address", table.listen_address)
    else:
        listen = ListenAddress()
    is_told_where = listen_address is not None or port is not None
    made = ServeSettings(
        core, listen, table, frozenset(said) | ({"listen_address"} if is_told_where else frozenset())
    )
    try:
        addresses_of(table)
    except ConfigError as error:
        raise ConfigError(f"{made.where('advertise')}: {error}") from None
    return made
