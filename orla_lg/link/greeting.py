"""How a connection begins: a server is reached, hello is said, and a welcome that fits comes back."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, NamedTuple

from orla_lg.link.dialing import DIAL_S, READ_BYTES, Dialed, NotReady, ServerAddress, Unwelcome, dial
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.messages import PROTOCOL, Bye, Hello, Welcome, flat, read
from orla_lg.link.waking import Waker

TICK_S = 0.05
"""How often what is due is looked at while there is no connection."""


class Greeted(NamedTuple):
    """A connection that a core has welcomed."""

    dialed: Dialed
    welcome: Welcome
    reader: FrameReader
    early: Sequence[Sequence[Any]]
    """What came right behind the welcome."""
    sent_s: float
    """When hello was said."""


def greet(addresses: Sequence[ServerAddress], key: str | None, hello: Hello) -> Greeted:
    """Try each address once, in order.

    Raises:
        Unwelcome: A server answers and will not take the link, or it is none.
        OSError, LinkBroken: None of them can be had now; why the last one cannot.
    """
    failed: OSError | LinkBroken | None = None
    for address in addresses:
        try:
            return _greeted(dial(address, key, hello.version), hello)
        except (OSError, LinkBroken) as error:
            failed = error
    raise NotReady("no core is known yet") if failed is None else failed


def greet_aside(
    addresses: Sequence[ServerAddress], key: str | None, hello: Hello, waker: Waker, goes_on: Callable[[], bool]
) -> Greeted:
    """``greet`` in a thread of its own: a server that is cut off keeps it waiting, and what is due goes on.

    Args:
        addresses: Tried in order.
        key: Of scope ``link``.
        hello: What is said.
        waker: Of this thread.
        goes_on: Called every ``TICK_S`` seconds; returns whether a server is still wanted.

    Raises:
        Unwelcome, OSError, LinkBroken: As ``greet``; no server is wanted any more.
    """
    done: Future[Greeted] = Future()

    def work() -> None:
        try:
            done.set_result(greet(addresses, key, hello))
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            done.set_exception(error)
        waker.wake()

    threading.Thread(target=work, name="orla-link-dial", daemon=True).start()
    while not done.done():
        waker.sleep(TICK_S)
        if not goes_on():
            done.add_done_callback(_let_go)
            raise ConnectionAbortedError("no server is wanted any more")
    return done.result()


def _let_go(done: Future[Greeted]) -> None:
    if done.exception() is None:
        done.result().dialed.socket.close()


def _greeted(dialed: Dialed, hello: Hello) -> Greeted:
    """Say hello, and wait for the welcome."""
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
        welcome = _welcome(dialed.address, came[0], hello)
    except BaseException:
        dialed.socket.close()
        raise
    dialed.socket.setblocking(False)
    return Greeted(dialed, welcome, reader, came[1:], sent_s)


def _welcome(address: ServerAddress, came: Sequence[Any], hello: Hello) -> Welcome:
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
    if welcome.epoch < hello.epoch:
        raise ConnectionResetError(
            f"the core at {address.text} is of epoch {welcome.epoch}, and one of epoch {hello.epoch} followed it"
        )
    return welcome
