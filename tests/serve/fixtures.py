"""What tests of the server share: keys, time, and a real server with a small app behind the layer."""

from __future__ import annotations

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


def until(holds: Callable[[], bool], within_s: float = 2.0) -> None:
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
        config = uvicorn.Config(
            AccessLayer(self.app, self.access, guard or HttpGuard()), http=GuardedHttpProtocol, ws="none",
            lifespan="off", log_config=None, access_log=False, proxy_headers=False, server_header=False,
        )  # fmt: skip
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> Self:
        self._thread.start()
        until(lambda: self._server.started, 10)
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
        until(lambda: not state.connections and not state.tasks, 5)

    def connect(self) -> socket.socket:
        opened = socket.create_connection(("127.0.0.1", self.port))
        opened.settimeout(5)
        return opened

    def raw(
        self, *parts: bytes, pause_s: float = 0.03, wait_s: float = 0.15, ends: bool = False
    ) -> tuple[list[int], bool]:
        """Send bytes as they are; returns the statuses that came, and whether the server hung up."""
        with self.connect() as opened:
            for number, part in enumerate(parts):
                if number:
                    time.sleep(pause_s)
                try:
                    opened.sendall(part)
                except OSError:
                    break
            if ends:  # nothing more comes, so the server closes
                with contextlib.suppress(OSError):
                    opened.shutdown(socket.SHUT_WR)
            opened.settimeout(5.0 if ends else wait_s)
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
