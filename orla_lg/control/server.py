"""The control server: a Unix socket that only its user may open, served on Orla's background thread.

The core does not know of it and never waits for it: a client that stalls, dies or talks nonsense costs one small task
on the background loop, for a bounded time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import stat
import sys
import weakref
from collections.abc import AsyncGenerator
from concurrent.futures import CancelledError
from contextvars import Context
from pathlib import Path

from orla_lg.control import protocol
from orla_lg.control.commands import carry_out
from orla_lg.control.protocol import MAX_LINE_BYTES, ControlReply
from orla_lg.control.state import state
from orla_lg.core.boundary.plain import is_path, shown
from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError, OrlaClosed, OrlaError

log = logging.getLogger("orla_lg")

PATH_BYTES = 103 if sys.platform == "darwin" else 107
"""A Unix socket's address holds so much, and a NUL."""

MAX_CLIENTS = 16
IDLE_S = 60.0
"""A client that asks nothing for so long is hung up on."""

STALL_S = 5.0
"""A client that does not read its answer for so long is hung up on."""

CLOSE_PATIENCE_S = 1.0


def open_server(path: Path, serving: Serving) -> ControlServer | None:
    """Open a control socket at *path*; ``None`` if another process has one there, which is logged.

    Several processes may share a configuration (workers of a web server); the first one to start has the socket.

    Raises:
        ConfigError: There can be no socket: the folder is missing or another user's, a file is in the way, the path
            is too long, or the platform has no Unix sockets.
    """
    if not hasattr(socket, "AF_UNIX"):
        raise ConfigError(f"control: {path}: this platform has no Unix sockets; leave control out")
    _check_path(path)
    _check_folder(path)
    if _is_in_use(path):
        log.warning(
            "control: another process is served at %s; this one (pid %d) has no control socket", path, os.getpid()
        )
        return None
    return ControlServer(path, _listen(path), serving)


def _check_path(path: Path) -> None:
    """Refuse what no socket can be called, before anything is asked of the system."""
    if not is_path(path):
        raise ConfigError(f"control: {str(path)!r} is no socket's path: there is a NUL or a lone surrogate in it")
    if (length := len(os.fsencode(path))) > PATH_BYTES:
        raise ConfigError(
            f"control: {shown(path, 200)}: no socket can be made there, the path is too long: {length} bytes, and a "
            f"Unix socket's has {PATH_BYTES} at most"
        )


def _check_folder(path: Path) -> None:
    folder = path.absolute().parent
    try:
        found = folder.stat()
    except OSError as error:
        raise ConfigError(f"control: {path}: the folder {folder} cannot be used ({error.strerror})") from error
    others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not found.st_mode & stat.S_ISVTX
    if found.st_uid != os.geteuid() or others:
        # In a sticky folder of ours others may put files, and cannot touch this one.
        raise ConfigError(
            f"control: {path}: others may write to the folder {folder} (mode {stat.S_IMODE(found.st_mode):04o}, user "
            f"{found.st_uid}); name a file in a folder of your own, such as {Path.home() / '.cache'}, or run "
            f"`chmod go-w {folder}`"
        )


def _is_in_use(path: Path) -> bool:
    """Whether a process answers at *path*; a socket that a dead process left is removed."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise ConfigError(f"control: {path}: what is there cannot be looked at ({error.strerror})") from error
    if not stat.S_ISSOCK(found.st_mode):
        raise ConfigError(f"control: {path}: there is a file that is no socket; name another path")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(STALL_S)
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return False
        except OSError:  # alive but busy, or not ours to reach
            return True
    return True


def _listen(path: Path) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(str(path))
        path.chmod(0o600)  # before any client can connect
        listening.listen(MAX_CLIENTS)
    except OSError as error:
        listening.close()
        raise ConfigError(f"control: {path}: no socket can be made there ({error.strerror or error})") from error
    return listening


class ControlServer:
    """An open control socket; closed with its ``Orla``, and when its core is dropped: it does not keep that alive."""

    def __init__(self, path: Path, listening: socket.socket, serving: Serving) -> None:
        self.path = path
        self._core = weakref.ref(serving)
        self._background = serving.background
        self._listening = listening
        self._inode, self._pid = path.stat().st_ino, os.getpid()
        self._server: asyncio.Server | None = None
        self._clients: set[asyncio.StreamWriter] = set()
        Context().run(serving.background.submit, self._open())  # no client runs in the context that constructs it
        serving.resources.add(self._let_go)

    @property
    def _serving(self) -> Serving:
        serving = self._core()
        if serving is None:
            raise OrlaClosed("this Orla is gone")
        return serving

    async def _open(self) -> None:
        self._server = await asyncio.start_unix_server(self._serve, sock=self._listening, limit=MAX_LINE_BYTES)

    def close(self) -> None:
        """Hang up, and remove the socket. Idempotent; in a forked child it only lets go of its copy."""
        if os.getpid() != self._pid:
            self._listening.close()
            return
        self._unlink()
        with contextlib.suppress(OrlaClosed, TimeoutError, CancelledError):
            self._background.submit(self._shut()).result(CLOSE_PATIENCE_S)

    def _unlink(self) -> None:
        with contextlib.suppress(OSError):
            if self.path.stat().st_ino == self._inode:  # another process may have put its own there since
                self.path.unlink()

    def _let_go(self) -> None:
        """Close from the loop's own thread."""
        self._unlink()
        self._hang_up()

    async def _shut(self) -> None:
        self._hang_up()

    def _hang_up(self) -> None:
        if self._server is not None:
            self._server.close()
        for writer in self._clients:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Talk to one client until it hangs up, stalls, or has nothing to say."""
        self._clients.add(writer)
        try:
            if len(self._clients) > MAX_CLIENTS:
                await self._send(
                    writer, ControlReply(ok=False, error=f"{MAX_CLIENTS} clients are being served already")
                )
            else:
                await self._talk(reader, writer)
        except (ConnectionError, TimeoutError, asyncio.CancelledError):
            # Cancelled by the end of the loop: the task ends here either way, and asyncio would log it as an error.
            writer.transport.abort()  # what was not read yet will not be
        finally:
            self._clients.discard(writer)
            writer.close()

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            try:
                async with asyncio.timeout(IDLE_S):
                    line = await reader.readline()
            except ValueError:  # where the next request begins is not known then
                await self._send(
                    writer, ControlReply(ok=False, error=f"a request is longer than {MAX_LINE_BYTES} bytes")
                )
                return
            if not line:
                return
            async with contextlib.aclosing(self._answers(line)) as answers:
                async for answer in answers:
                    await self._send(writer, answer)

    async def _send(self, writer: asyncio.StreamWriter, answer: ControlReply) -> None:
        writer.write(protocol.encode(answer))
        async with asyncio.timeout(STALL_S):
            await writer.drain()

    async def _answers(self, line: bytes) -> AsyncGenerator[ControlReply]:
        try:
            request = protocol.parse(line)
            if isinstance(request, protocol.Watch):
                while True:
                    yield ControlReply(ok=True, state=state(self._serving))
                    await asyncio.sleep(request.interval_s)
            yield await carry_out(self._serving, request)
        except OrlaError as error:
            yield ControlReply(ok=False, error=str(error))
