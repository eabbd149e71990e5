"""The socket that the server listens on, opened before anything else is begun."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from orla_lg.errors import ConfigError
from orla_lg.serve.settings import ListenAddress

BACKLOG = 2048


class Listening:
    """A socket that listens at an address, until ``close``.

    Args:
        address: Where.

    Raises:
        ConfigError: Another program does, or nothing can.
    """

    def __init__(self, address: ListenAddress) -> None:
        self.address = address
        self.socket = _unix(address.path) if address.path is not None else _tcp(address)
        self._file = None if address.path is None else address.path.stat()

    @property
    def port(self) -> int:
        """The port; 0 of a Unix socket."""
        return 0 if self.address.path is not None else int(self.socket.getsockname()[1])

    def close(self) -> None:
        """Close it, and remove the file of a Unix socket if it is still its own. Idempotent."""
        self.socket.close()
        path, before, self._file = self.address.path, self._file, None
        if path is not None and before is not None:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(path.lstat(), before):
                    path.unlink()


def _tcp(address: ListenAddress) -> socket.socket:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except OSError as error:
        raise ConfigError(f"listen address {address}: the host is not known: {error.strerror or error}") from error
    family, kind, protocol, _, where = found[0]
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections have it from here
        opened.bind(where)
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise ConfigError(f"listen address {address}: {_fault(error, address)}") from error
    return opened


def _fault(error: OSError, address: ListenAddress) -> str:
    if error.errno == errno.EADDRINUSE:
        return (
            f"port {address.port} is taken by another program, or another `orla-lg serve`; --port takes another one, "
            "--port 0 a free one"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return "no interface of this machine has that address"
    return error.strerror or str(error)


def _unix(path: Path) -> socket.socket:
    """Open a socket that only this user may connect to; one that is left of a process that is gone is replaced."""
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(f"listen address unix:{path}: this platform has no Unix sockets")
    opened = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    umask = os.umask(0o177)
    try:
        _make_room(path)
        opened.bind(str(path))
        opened.listen(BACKLOG)
    except OSError as error:
        opened.close()
        raise ConfigError(f"listen address unix:{path}: {error.strerror or error}") from error
    except ConfigError:
        opened.close()
        raise
    finally:
        os.umask(umask)
    return opened


def _make_room(path: Path) -> None:
    try:
        found = path.lstat()
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"listen address unix:{path}: a file is there that is no socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
        asked.settimeout(1.0)
        try:
            asked.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
    raise ConfigError(f"listen address unix:{path}: another program listens there")
