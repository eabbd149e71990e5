"""What tests of the server share: keys, time, and a real server with a small app behind the layer."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Self

import httpx
import uvicorn

from orla_lg.serve.access.access import Access
from orla_lg.serve.access.keys import AccessKey, Keyring, create
from orla_lg.serve.http.guard import AccessLayer, HttpGuard
from orla_lg.serve.http.protocol import GuardedHttpProtocol
from orla_lg.serve.store.store import MemoryStore, Store


def make(store: Store, name: str = "key", **given: Any) -> tuple[AccessKey, str]:
    """Make a key."""
    return create(store, lambda key_id, sha256: AccessKey(key_id, name, sha256, **given))


def bearer(secret: str) -> list[tuple[bytes, bytes]]:
    return [(b"authorization", f"Bearer {secret}".encode())]


PATIENCE_S = 30.0
"""A guard only."""

ROUNDS = 25
"""Of the server's loop, in which it does what bytes that it got lead to; there is none that waits for a thread."""


def until(holds: Callable[[], bool], within_s: float = PATIENCE_S) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.005)


class App:
    """An app that notes what reaches it; ``/boom`` fails."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, bytes]] = []
        self.scopes: list[Mapping[str, Any]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return
            body += message.get("body", b"")
            more = message.get("more_body", False)
        self.seen.append((scope["method"], scope["path"], body))
        self.scopes.append(scope)
        if scope["path"] == "/boom":
            raise RuntimeError("the app fails")
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})


class Served:
    """A real server on a free port of 127.0.0.1, with the app behind the layer. Ends with its ``with`` block."""

    def __init__(self, store: Store | None = None, guard: HttpGuard | None = None, app: Any = None) -> None:
        self.store = store or MemoryStore()
        self.app = app or App()
        self.keyring = Keyring(self.store)
        self.access = Access(self.keyring)
        self._listening = socket.socket()
        self._listening.bind(("127.0.0.1", 0))
        self.port: int = self._listening.getsockname()[1]
        self._config = config = uvicorn.Config(
            AccessLayer(self.app, self.access, guard or HttpGuard()), http=GuardedHttpProtocol, ws="none",
            lifespan="off", log_config=None, access_log=False, proxy_headers=False, server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=self._config.get_loop_factory()) as runner:
            self._loop = runner.get_loop()
            runner.run(self._server.serve([self._listening]))

    def rounds(self) -> None:
        """Wait until the server's loop went round often enough to have dealt with all that it got."""
        assert self._loop is not None
        for _ in range(ROUNDS):
            gone = threading.Event()
            self._loop.call_soon_threadsafe(gone.set)
            assert gone.wait(PATIENCE_S)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *_: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = True
        self._thread.join(10)
        self._listening.close()
        self.keyring.close()

    def ask(self, method: str = "POST", path: str = "/v1/x", **more: Any) -> httpx.Response:
        if method in ("POST", "PUT", "PATCH") and not {"content", "json", "data", "files"} & more.keys():
            more["json"] = {}
        with httpx.Client(trust_env=False) as client:
            return client.request(method, self.url + path, timeout=10, **more)

    def settle(self) -> None:
        """Wait until the server has done with all connections."""
        state = self._server.server_state
        until(lambda: not state.connections and not state.tasks)

    def connect(self) -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port))
        opened.settimeout(PATIENCE_S)
        return opened

    def raw(
        self, *parts: bytes, pause_s: float = 0.0, waits: bool = False, ends: bool = False
    ) -> tuple[list[int], bool]:
        """Send bytes as they are; returns the statuses that came, and whether the server hung up.

        Args:
            parts: The server reads each by itself.
            pause_s: Between them, at least.
            waits: Until the server hangs up, whatever it waits for itself.
            ends: Say that nothing more comes, so that the server closes.
        """
        with self.connect() as opened:
            for number, part in enumerate(parts):
                if number:
                    self.rounds()
                    time.sleep(pause_s)
                    if _is_refused(opened):  # what is sent to a closed connection may cost the answer
                        break
                try:
                    opened.sendall(part)
                except OSError:
                    break
            if ends:
                with contextlib.suppress(OSError):
                    opened.shutdown(socket.SHUT_WR)
            if not (ends or waits):
                self.rounds()
                opened.settimeout(0.02)
            got, closed = b"", False
            try:
                while data := opened.recv(65536):
                    got += data
                closed = True
            except TimeoutError:
                pass
            except OSError:
                closed = True
        return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", got)], closed


def _is_refused(opened: socket.socket) -> bool:
    """Whether the last that came says that nothing more is taken."""
    opened.setblocking(False)
    try:
        came = opened.recv(65536, socket.MSG_PEEK)
    except BlockingIOError:
        return False
    except OSError:
        return True
    finally:
        opened.settimeout(PATIENCE_S)
    return not came or b"HTTP/1.1 4" in came
