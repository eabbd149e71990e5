"""A core as a script: it speaks the link's bytes on real sockets, and remembers what it heard."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from orla_lg.core.engine.backend import Backend, Capability, Probe, Support
from orla_lg.core.placement.view import BackendView
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.messages import (
    PROTOCOL,
    Adopt,
    Bye,
    End,
    Enter,
    Grant,
    Hello,
    Message,
    Missed,
    Ready,
    Refused,
    Renew,
    Renewed,
    Request,
    RequestDone,
    Welcome,
    flat,
    read,
)  # fmt: skip
from orla_lg.link.views import flat_backend, flat_view
from tests.stub_engine import MODEL

M = TypeVar("M", bound=tuple[Any, ...])

PATIENCE_S = 60.0

SPEAKS = Probe(models=(MODEL,), capabilities={Capability.STREAM_USAGE: Support.NATIVE})


class Connection:
    """One connection of a replica."""

    def __init__(self, core: ScriptedCore, connected: socket.socket) -> None:
        self.core, self.socket = core, connected
        self.hello: Hello | None = None
        self.silent = False
        self._lock = threading.Lock()

    def send(self, *messages: Message) -> None:
        for message in messages:
            self.send_bytes(frame(flat(message)))

    def send_bytes(self, data: bytes) -> None:
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(data)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()

    def run(self) -> None:
        try:
            self._talk()
        except (OSError, LinkBroken):
            pass
        finally:
            self.close()

    def _talk(self) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            if not (data := self.socket.recv(65536)):
                return
            head += data
        head, _, rest = head.partition(b"\r\n\r\n")
        self.core.heads.append(head.decode())
        while self.core.deaf:
            time.sleep(0.01)
        if self.core.answer is not None:
            self.send_bytes(self.core.answer)
            return
        self.send_bytes(b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: orla-link\r\n\r\n")
        reader = FrameReader()
        self._take(reader, rest)
        while data := self.socket.recv(65536):
            self._take(reader, data)

    def _take(self, reader: FrameReader, data: bytes) -> None:
        for fields in reader.feed(data):
            message = read(fields)
            assert message is not None
            if isinstance(message, Hello):
                self.hello = message
                self.core.connections.append(self)
                self.send(self.core.welcome())
            elif isinstance(message, Renew) and not self.silent:
                self.send(Renewed(message.number, self.core.replicas))
            self.core.note(self, message)


class ScriptedCore:
    """Grants each call at once to its first backend, unless it is told otherwise."""

    def __init__(
        self, *backends: Backend, epoch: int = 1, unix: str | None = None, key_env: str | None = None
    ) -> None:
        self.backends, self.epoch, self.key_env = backends, epoch, key_env
        self.grants = True
        self.answer: bytes | None = None
        """Sent instead of an upgrade."""
        self.tls: ssl.SSLContext | None = None
        self.warms = False
        self.deaf = False
        self.protocol = PROTOCOL
        self.replicas = 1
        self.replica_lease_s = 10.0
        self.mapping: dict[str, Any] = {}
        self.limits: dict[str, Any] = {}
        self.tenants: Sequence[str] | None = None
        self.cores: dict[str, Sequence[str]] = {}
        self.pool = ""
        self.requests: dict[str, Callable[[dict[str, Any]], Any]] = {}
        self.heard: list[Message] = []
        self.heads: list[str] = []
        self.connections: list[Connection] = []
        self._changed = threading.Condition()
        self._unix = unix
        self._port = 0
        self._listening: socket.socket | None = None
        self.listen()

    @property
    def url(self) -> str:
        return f"unix:{self._unix}" if self._unix else f"http://127.0.0.1:{self._port}"

    def listen(self) -> None:
        """Begin, or begin again at the same place."""
        if self._unix:
            listening = socket.socket(socket.AF_UNIX)
            listening.bind(self._unix)
        else:
            listening = socket.socket()
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(("127.0.0.1", self._port))
            self._port = listening.getsockname()[1]
        listening.listen(16)
        self._listening = listening
        threading.Thread(target=self._accept, args=(listening,), name="scripted", daemon=True).start()

    def _accept(self, listening: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connected, _ = listening.accept()
                if self.tls is not None:
                    with contextlib.suppress(OSError):  # a client that does not trust it
                        connected = self.tls.wrap_socket(connected, server_side=True)
                connection = Connection(self, connected)
                threading.Thread(target=connection.run, name="scripted", daemon=True).start()

    def __enter__(self) -> ScriptedCore:
        return self

    def __exit__(self, *exc: object) -> None:
        self.gone()

    def gone(self) -> None:
        """Be killed: nothing listens, and all connections end."""
        if self._listening is not None:
            with contextlib.suppress(OSError):
                self._listening.shutdown(socket.SHUT_RDWR)
            self._listening.close()
            self._listening = None
        self.drop()

    def drop(self) -> None:
        """End all connections."""
        for connection in self.connections:
            connection.close()

    def next_core(self) -> None:
        """Be followed by a core with the next epoch, at the same place."""
        self.epoch += 1
        self.heard.clear()
        self.listen()

    def welcome(self) -> Welcome:
        backends = [flat_backend(each, api_key_env=self.key_env, warms=self.warms) for each in self.backends]
        return Welcome(
            self.protocol, self.epoch, "9.9", backends, self.views(), self.mapping, self.limits, self.replica_lease_s,
            1.5, self.replicas, self.tenants, False, self.cores, self.pool,
        )  # fmt: skip

    def views(self) -> list[dict[str, Any]]:
        return [
            flat_view(BackendView(each.name, (), SPEAKS, each.cost, None, 0, 0, each.max_concurrency))
            for each in self.backends
        ]

    # What it does

    @property
    def line(self) -> Connection:
        return self.connections[-1]

    def note(self, connection: Connection, message: Message) -> None:
        if isinstance(message, Enter) and self.grants:
            connection.send(self.grant(message.call))
        elif isinstance(message, Missed) and self.grants:
            connection.send(self.grant(message.call, message.attempt + 1))
        elif isinstance(message, Request) and message.what in self.requests:
            done = self.requests[message.what](dict(message.more))
            connection.send(RequestDone(message.number, *(done if isinstance(done, tuple) else (done,))))
        with self._changed:
            self.heard.append(message)
            self._changed.notify_all()

    def grant(self, call: str, attempt: int = 1, **more: Any) -> Grant:
        backend = self.backends[0]
        given = {"mapper": "core", "reason": "scripted", "counts_streams": True, **more}
        return Grant(call, self.epoch, attempt, backend.name, backend.model, **given)

    def refuse(self, call: str, kind: str, text: str, **more: Any) -> None:
        self.line.send(Refused(call, kind, text, more))

    def all(self, kind: type[M]) -> list[M]:
        with self._changed:
            return [message for message in self.heard if isinstance(message, kind)]

    def wait(self, kind: type[M], number: int = 1) -> M:
        """Wait until so many messages of a kind came, and return the last of these."""
        deadline = time.monotonic() + PATIENCE_S
        with self._changed:
            while len(found := [message for message in self.heard if isinstance(message, kind)]) < number:
                left_s = deadline - time.monotonic()
                assert left_s > 0 and self._changed.wait(left_s), (kind, self.heard)
            return found[number - 1]


def eventually(holds: Callable[[], object], patience_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.002)


__all__ = ["Adopt", "Bye", "End", "Ready", "ScriptedCore", "eventually"]
