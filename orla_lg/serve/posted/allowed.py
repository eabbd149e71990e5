"""Where what is posted may point, and which keys it may send there.

A route that takes URLs makes the server a way into networks that only the server reaches. So a posted URL names a
host that ``[serve] posted_hosts`` allows; where that is left out, any host but those at which clouds hand out their
machines' credentials. A key is read from a variable that ``[serve] posted_key_envs`` names, and is sent to the hosts
that are named with it only: none, where nothing is named.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from urllib.parse import urlsplit

from orla_lg.config_tables import ServeTable
from orla_lg.errors import ConfigError, shown

PORTS = {"http": 80, "https": 443}

METADATA = frozenset({"metadata", "metadata.google.internal", "metadata.goog", "instance-data"})
"""Names of the service that hands out a cloud machine's credentials."""

METADATA_ADDRESSES = frozenset(map(ipaddress.ip_address, ("fd00:ec2::254", "100.100.100.200", "168.63.129.16")))
"""The addresses of such services that are not link-local."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """What may be posted."""

    hosts: tuple[str, ...] | None = None
    """Patterns; ``None``: all but those of metadata."""
    key_envs: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """By variable, the patterns of hosts that may get its key."""

    @classmethod
    def of(cls, table: ServeTable) -> Allowed:
        """Return what ``[serve]`` says."""
        return cls(table.posted_hosts, table.posted_key_envs)

    def check_url(self, where: str, url: str, *, resolves: bool = False) -> None:
        """Refuse a URL that must not be posted.

        Args:
            where: The field, for messages.
            url: Its value.
            resolves: Whether the name is looked up too; that takes time, and tells nothing where there is no answer.

        Raises:
            ConfigError: It is no URL of HTTP, or its host is not allowed.
        """
        host, port = _parts(where, url)
        if self.hosts is not None:
            if not _among(self.hosts, host, port):
                raise ConfigError(
                    f"{where}: host {shown(host)} is not among [serve] posted_hosts, which says what may be posted"
                )
            return
        addresses = _looked_up(host) if resolves else _literal(host)
        if host in METADATA or any(map(_is_metadata, addresses)):
            raise ConfigError(
                f"{where}: host {shown(host)} is where clouds hand out credentials; [serve] posted_hosts can allow it"
            )

    def check_key(self, variable: str, url: str) -> None:
        """Refuse to send the key in a variable to the host of a URL.

        Raises:
            ConfigError: The variable must not be named, or that host must not get its key.
        """
        if variable not in self.key_envs:
            right = f'[serve.posted_key_envs] {variable} = ["HOST"] allows it'
            raise ConfigError(f"api_key_env_var: {shown(variable)} must not be named by what is posted; {right}")
        host, port = _parts("endpoint", url)
        if not _among(self.key_envs[variable], host, port):
            named = ", ".join(self.key_envs[variable]) or "none"
            raise ConfigError(
                f"api_key_env_var: the key in {shown(variable)} must not go to {shown(host)}; "
                f"[serve.posted_key_envs] names the hosts that may get it: {named}"
            )


def _parts(where: str, url: str) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError as error:
        raise ConfigError(f"{where}: {shown(url)} is no URL: {error}") from None
    if parts.scheme not in PORTS or not host or parts.username is not None or parts.password is not None:
        raise ConfigError(f"{where}: {shown(url)} is not http(s)://host[:port]/path")
    return host, port or PORTS[parts.scheme]


def _among(patterns: Iterable[str], host: str, port: int) -> bool:
    named = f"[{host}]" if ":" in host else host
    said = (host, named, f"{named}:{port}")
    # A bracket is an IPv6 address's, and no class of characters.
    return any(fnmatchcase(each, pattern.lower().replace("[", "[[]")) for pattern in patterns for each in said)


def _literal(host: str) -> list[str]:
    """Return the address that a host is; numbers are read as C's resolver reads them."""
    try:
        return [str(ipaddress.ip_address(host.partition("%")[0]))]
    except ValueError:
        try:
            return [socket.inet_ntoa(socket.inet_aton(host))]
        except OSError:
            return []


def _looked_up(host: str) -> list[str]:
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        return _literal(host)
    return [str(each[4][0]) for each in found]


def _is_metadata(said: str) -> bool:
    address = ipaddress.ip_address(said.partition("%")[0])
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_link_local or address.is_unspecified or address in METADATA_ADDRESSES
