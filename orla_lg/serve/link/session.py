"""One connection of a replica: bytes in, bytes out, and which message is whose business.

A message is decided upon in the callback that reads it; what is to be sent goes out together at the end of the loop's
turn.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Protocol, cast

from orla_lg.core.serving import Serving
from orla_lg.errors import shown
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.messages import (
    PROTOCOL,
    Adopt,
    Bye,
    End,
    Enter,
    FirstToken,
    Graph,
    Hello,
    Keeps,
    Message,
    Missed,
    Ready,
    Renew,
    Renewed,
    Request,
    RequestDone,
    Signal,
    SlotContents,
    WarmEnded,
    Welcome,
    flat,
    read,
)
from orla_lg.serve.link.arrivals import LinkedCalls
from orla_lg.serve.link.flat import LinkCaller
from orla_lg.serve.link.requests import Requests
from orla_lg.serve.link.roster import Replica
from orla_lg.serve.link.signals import RunSignals
from orla_lg.serve.link.warming import LinkKeeper
from orla_lg.serve.store.lease import CoreLease

log = logging.getLogger("orla_lg")

COME_AGAIN = "this core does not decide; connect again"
"""Said to each replica while another core decides, or none can; why that is so is logged when it begins."""

MOST_OUTBOX = 8 * 2**20
"""Bytes that may wait for a replica to read them; one that does not is cut off."""


class SessionHost(Protocol):
    """What a connection needs of its host (``sessions.LinkHost``)."""

    serving: Serving
    lease: CoreLease
    sessions: set[LinkSession]
    version: str
    arrivals: LinkedCalls
    signals: RunSignals
    requests: Requests

    @property
    def connected(self) -> int:
        """How many replicas are connected."""
        ...

    def joined(self, session: LinkSession, hello: Hello) -> Replica | str | None:
        """Take in a replica; returns it, or why it is refused; ``None``: it is another pool's core that looks on."""
        ...

    def welcome(self, caller: LinkCaller) -> Welcome:
        """Return what a replica must know of this core."""
        ...

    def ready(self, replica: Replica) -> None:
        """Note that a replica said all that it has."""
        ...

    def left(self, replica: Replica) -> None:
        """Note that a replica went in good order."""
        ...

    def lost(self, session: LinkSession) -> None:
        """Note the end of a connection."""
        ...


class LinkSession(asyncio.Protocol):
    """One connection of a replica.

    Args:
        host: Serves it.
        caller: What its key allows.
        looks_on: It is another pool's core.
    """

    def __init__(self, host: SessionHost, caller: LinkCaller, *, looks_on: bool = False) -> None:
        self.host = host
        self.caller = caller
        self.replica: Replica | None = None
        """``None`` before its ``Hello``."""
        self.looks_on, self.views = looks_on, False
        """It is another pool's core; and it said hello: it is pushed views, and says nothing but that it is there."""
        self.heard_s = host.serving.clock()
        """When something came last."""
        self._reader = FrameReader()
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._out: list[bytes] = []
        self._ended = False
        self._keeper = LinkKeeper(self._loop, self.send)
        self._tasks = set[asyncio.Task[None]]()
        self._ends: list[End] | None = []
        """What came before ``Ready``: places must not be given on before the calls are back that wait for them."""

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)  # uvloop has its own, which are no subclass
        self._transport.set_write_buffer_limits(high=MOST_OUTBOX)
        self.host.sessions.add(self)

    def data_received(self, data: bytes) -> None:
        """Take in what came."""
        if self._ended:
            return
        self.heard_s = self.host.serving.clock()
        try:
            for fields in self._reader.feed(data):
                message = read(fields)
                if message is not None:
                    self._take(message)
                if self._has_ended():
                    return
        except LinkBroken as error:
            self.cut(str(error))
        except Exception:  # one peer's message must not end the loop of all
            log.exception("a message of %s could not be taken in; its connection ends", self._name)
            self.cut("a message could not be taken in")

    def pause_writing(self) -> None:
        """End the connection: its replica does not read."""
        self.cut(f"more than {MOST_OUTBOX} bytes wait for it")

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end."""
        self._close()

    # Out

    def send(self, message: Message) -> None:
        """Send a message with the others of this turn of the loop.

        Raises:
            LinkBroken: It cannot be sent; the connection is as before.
        """
        if self._ended:
            return
        try:
            packed = frame(flat(message))
        except LinkBroken as error:
            if not isinstance(message, RequestDone):
                raise
            packed = frame(flat(RequestDone(message.number, str(error), LinkBroken.__name__)))
        self.send_frame(packed)

    def send_frame(self, packed: bytes) -> None:
        """Send a message that is packed already, as it is for others too."""
        if self._ended:
            return
        if not self._out:
            self._loop.call_soon(self._flush)
        self._out.append(packed)

    def _flush(self) -> None:
        out, self._out = self._out, []
        if self._transport is not None and out and not self._transport.is_closing():
            self._transport.write(b"".join(out) if len(out) > 1 else out[0])

    def goodbye(self, reason: str) -> None:
        """Say why, and end the connection."""
        if not self._ended:
            self.send(Bye(reason))
            self._flush()
            if self._transport is not None:
                self._transport.close()
            self._close()

    def cut(self, why: str) -> None:
        """End the connection now, with a line in the log."""
        if not self._ended:
            log.warning("the link of %s is cut off: %s", self._name, why)
            if self._transport is not None:
                self._transport.abort()
            self._close()

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._keeper.close()
            for task in self._tasks:
                task.cancel()
        self.host.lost(self)

    def _has_ended(self) -> bool:
        return self._ended

    @property
    def _name(self) -> str:
        replica = self.replica
        if self.views:
            return "another pool's core"
        if replica is None:
            return "a peer that did not say its name"
        return f"replica {shown(replica.id)} ({shown(replica.host.partition(' ')[0])}, process {replica.pid})"

    # In

    def _take(self, message: Message) -> None:
        if (handle := _HANDLERS.get(type(message))) is not None and self.replica is not None:
            handle(self, self.replica, message)
        elif isinstance(message, Hello) and self.replica is None and not self.views:
            self._hello(message)
        elif self.views and isinstance(message, Renew):
            self._renewed(message)
        elif self.views and isinstance(message, Bye):
            self.goodbye("goodbye")
        elif self.views and isinstance(message, Ready):
            pass
        else:
            raise LinkBroken(f"{type(message).__name__} is not what a replica says here")

    def _hello(self, message: Hello) -> None:
        joined = self.host.joined(self, message)
        if joined is None:
            self.views = True
            self.send(self.host.welcome(self.caller))
            return
        if isinstance(joined, str):
            level = logging.INFO if joined == COME_AGAIN else logging.WARNING
            log.log(level, "a replica on %s was refused: %s", shown(message.host.partition(" ")[0]), joined)
            if message.protocol != PROTOCOL:
                self.send(Welcome(PROTOCOL, self.host.lease.epoch, self.host.version))  # by which it sees why
            self.goodbye(joined)
            return
        self.replica = joined
        self.send(self.host.welcome(self.caller))

    def _renew(self, replica: Replica, message: Renew) -> None:
        self._renewed(message)

    def _renewed(self, message: Renew) -> None:
        # Without the lease this core may be one that another has replaced: its replicas must not count on it.
        if self.host.lease.holds():
            self.send(Renewed(message.number, self.host.connected))

    def _bye(self, replica: Replica, message: Bye) -> None:
        self.host.left(replica)
        replica.session = None
        if self._transport is not None:
            self._transport.close()
        self._close()

    def _end(self, replica: Replica, message: End) -> None:
        if self._ends is None:
            self.host.arrivals.end(replica, message)
        else:
            self._ends.append(message)

    def _ready(self, replica: Replica, message: Ready) -> None:
        ends, self._ends = self._ends or (), None
        for each in ends:
            self.host.arrivals.end(replica, each)
        self.host.ready(replica)

    def _request(self, replica: Replica, message: Request) -> None:
        self.host.requests.answer(self.caller, message, self.send, self._tasks)

    def _enter(self, replica: Replica, message: Enter) -> None:
        self.host.arrivals.enter(replica, self, message)

    def _adopt(self, replica: Replica, message: Adopt) -> None:
        self.host.arrivals.adopt(replica, self, message)

    def _contents(self, replica: Replica, message: SlotContents) -> None:
        if self._ends is not None:  # later on this core knows better
            self.host.arrivals.recall(replica, message)

    def _keeps(self, replica: Replica, message: Keeps) -> None:
        self.host.arrivals.keeps(replica, message, self._keeper)


_HANDLERS: Mapping[type[Any], Callable[[LinkSession, Replica, Any], None]] = {
    Enter: LinkSession._enter,
    FirstToken: lambda self, replica, message: self.host.arrivals.first_token(replica, message),
    End: LinkSession._end,
    Missed: lambda self, replica, message: self.host.arrivals.missed(replica, message),
    Signal: lambda self, replica, message: self.host.signals.signal(replica, message),
    Keeps: LinkSession._keeps,
    Renew: LinkSession._renew,
    Graph: lambda self, replica, message: self.host.signals.graph(replica, message),
    Adopt: LinkSession._adopt,
    SlotContents: LinkSession._contents,
    Ready: LinkSession._ready,
    Request: LinkSession._request,
    WarmEnded: lambda self, replica, message: self._keeper.ended(message),
    Bye: LinkSession._bye,
}
"""What a replica may say after its ``Hello``."""
