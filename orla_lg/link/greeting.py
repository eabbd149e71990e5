"""How a connection begins: hello is said, and a welcome that fits comes back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from orla_lg.link.dialing import DIAL_S, READ_BYTES, Dialed, ServerAddress, Unwelcome
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.messages import PROTOCOL, Bye, Hello, Welcome, flat, read


class Greeted(NamedTuple):
    """A connection that a core has welcomed."""

    dialed: Dialed
    welcome: Welcome
    reader: FrameReader
    early: Sequence[Sequence[Any]]
    """What came right behind the welcome."""
    sent_s: float
    """When hello was said."""


def greet(dialed: Dialed, hello: Hello, pool: str | None = None) -> Greeted:
    """Say hello, and wait for the welcome of a core, of *pool* where that is given.

    Raises:
        Unwelcome: The server will not take the link.
        OSError, LinkBroken: It does not welcome it now.
    """
    try:
        reader, sent_s = FrameReader(), time.monotonic()
        dialed.socket.sendall(dialed.codec.encode(frame(flat(hello))))
        came = list(reader.feed(dialed.began))
        while not came:
            if (left_s := sent_s + DIAL_S - time.monotonic()) <= 0:
                raise TimeoutError("the server took the link and does not welcome it")
            dialed.socket.settimeout(left_s)
            if not (data := dialed.socket.recv(READ_BYTES)):
                raise ConnectionResetError("the server took the link and hung up")
            came = list(reader.feed(dialed.codec.decode(data)))
        welcome = _welcome(dialed.address, came[0], hello, pool)
    except BaseException:
        dialed.socket.close()
        raise
    dialed.socket.setblocking(False)
    return Greeted(dialed, welcome, reader, came[1:], sent_s)


def _welcome(address: ServerAddress, came: Sequence[Any], hello: Hello, pool: str | None) -> Welcome:
    welcome = read(came)
    if isinstance(welcome, Bye):
        raise ConnectionResetError(f"the server at {address.text} says: {welcome.reason or 'not now'}")
    if not isinstance(welcome, Welcome):
        raise LinkBroken(f"the server at {address.text} does not begin with its welcome")
    if welcome.protocol != PROTOCOL:
        older = "the server" if welcome.protocol < PROTOCOL else "this replica"
        raise Unwelcome(
            f"the server at {address.text} (version {welcome.version or 'unknown'}) speaks protocol "
            f"{welcome.protocol} on links, this replica (version {hello.version}) speaks {PROTOCOL}: {older} is to "
            "be updated"
        )
    if pool is not None and welcome.pool != pool:
        raise ConnectionResetError(f"the core at {address.text} decides for pool {welcome.pool!r}, not for {pool!r}")
    if welcome.epoch < hello.epoch:
        raise ConnectionResetError(
            f"the core at {address.text} is of epoch {welcome.epoch}, and one of epoch {hello.epoch} followed it"
        )
    return welcome
