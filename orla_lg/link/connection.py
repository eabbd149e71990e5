"""One connection to the core: a thread that reads and renews, senders that do not wait for it, and what comes after.

Any thread sends: its bytes go out at once where the network takes them, else the link's thread sends the rest. So a
call costs one hop between threads, on its way back. When the connection is lost another one is made (``racing``), to
the next core where there is one (``following``); what the listener has is said again before anything else is sent
(``opening``).

The thread refers to its listener weakly, and ends with it. A forked child begins a connection of its own.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import select
import socket
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence

from orla_lg.core.background import is_collecting
from orla_lg.errors import BackendUnavailable, ConfigError
from orla_lg.link.dialing import READ_BYTES, Dialed, ServerAddress
from orla_lg.link.following import CoreAddresses, DirectorySource
from orla_lg.link.framing import FrameReader, LinkBroken, frame
from orla_lg.link.greeting import Greeted
from orla_lg.link.listener import Listener
from orla_lg.link.messages import (
    RENEW_S,
    SILENT_S,
    Bye,
    Hello,
    Message,
    Ready,
    Renew,
    Renewed,
    Welcome,
    flat,
    read,
)  # fmt: skip
from orla_lg.link.racing import FIRST_PAUSE_S, LONGEST_PAUSE_S, Race
from orla_lg.link.waking import Waker

TICK_S = 0.05
"""How often what is due is looked at while there is no connection."""

MOST_HELD_BYTES = 64 << 20
"""Bytes that a server does not read; with more it is dead."""

KEEP_RENEWALS = 100

CLOSE_S = 1.0

UNCONFIRMED_S = 2 * SILENT_S
"""A core that has not confirmed this replica's lease for so long may have lost its own: another one may decide."""

log = logging.getLogger("orla_lg")


class Link:
    """A connection to a core, for as long as it is wanted.

    Args:
        addresses: That the user named.
        key: Of scope ``link``.
        sources: Stores that the user named, whose directory says where cores are.
        pool: Whose core is wanted; ``None``: that of the first core that is met.
    """

    def __init__(
        self,
        addresses: Sequence[ServerAddress],
        key: str | None,
        sources: Sequence[DirectorySource] = (),
        pool: str | None = None,
    ) -> None:
        self.places, self._key = CoreAddresses(addresses, sources, has_key=key is not None, pool=pool), key
        self.lock = threading.RLock()
        """Held for what must not come between two messages: a change of state and its message, an opening."""
        self.replica = secrets.token_hex(8)
        self.epoch = 0
        """The highest that was met."""
        self.up = False
        """Whether what is sent goes out."""
        self.fault = ""
        """Why there is no connection; empty while there is one."""
        self.beginning = False
        """It has not tried to connect yet, since it was made or this process was forked."""
        self.lost_s = 0.0
        """When the last connection ended."""
        self.confirmed_s = float("-inf")
        """When the last message was sent that the core is known to have had: the replica's lease counts from then."""
        self.number = 0
        """Of the next ``Renew``."""
        self._renewals: dict[int, float] = {}
        self._listener: weakref.ref[Listener] | None = None
        self._dialed: Dialed | None = None
        self._reader = FrameReader()
        self._outbox = bytearray()
        self._deferred: deque[bytes] = deque()
        """Sent inside the collector, which may run under any lock."""
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._refusal: Exception | None = None
        """Why the last attempt to connect failed."""
        self._early: Sequence[Sequence[object]] = ()
        """What came right behind the welcome."""
        self._broken = ""
        """Why the connection is to be given up."""
        self._heard_s = self._renew_s = 0.0
        self._waker = Waker()
        _links.add(self)

    # The beginning

    def open(self, hello: Hello, patience_s: float) -> Welcome:
        """Connect from this thread, for at most *patience_s* seconds; servers may be changing places.

        Raises:
            ConfigError: A server answers and will not take the link, or it is none.
            BackendUnavailable: None answers in time.
        """
        until_s, wakes = time.monotonic() + patience_s, threading.Event()
        race = Race(self.places, self._key, hello, wakes.set)
        try:
            while (greeted := race.take()) is None:
                fault, left_s = race.fault, until_s - time.monotonic()
                self.fault = "it does not answer" if fault is None else _told(fault)
                if isinstance(fault, ConfigError) and (race.all_failed or left_s <= 0):
                    raise fault
                if left_s <= 0:
                    raise BackendUnavailable(
                        f"no orla_lg server answers at {self.places.text}: {self.fault}; is `orla-lg serve` running "
                        "there?"
                    ) from fault
                wakes.wait(left_s)
                wakes.clear()
            return self._took(greeted)
        finally:
            race.stop()

    def start(self, listener: Listener, welcome: Welcome) -> None:
        """Go on with the connection that ``open`` made, in a thread, for as long as *listener* is there."""
        self._listener = weakref.ref(listener)
        self._begin(listener, welcome)
        self._start_thread()

    def begin(self, listener: Listener) -> None:
        """Connect in a thread, for as long as *listener* is there; nothing is waited for."""
        self._listener = weakref.ref(listener)
        self.beginning, self.confirmed_s = True, time.monotonic()
        self.fault = "its core has not been met yet"
        self._start_thread()

    def tells(self, other: Link, urls: Sequence[str]) -> None:
        """Let another link look where this link's core says that its core is, as far as that is believed."""
        dialed = self._dialed
        if dialed is not None:
            other.places.hinted(dialed.address, list(urls))

    def _start_thread(self) -> None:
        self._thread = threading.Thread(target=self._run, name="orla-link", daemon=True)
        self._thread.start()

    def _took(self, greeted: Greeted) -> Welcome:
        """Go on with a connection."""
        self._dialed, welcome, self._reader, self._early, sent_s = greeted
        self.epoch, self._renewals = welcome.epoch, {}
        self._heard_s, self.confirmed_s = time.monotonic(), sent_s
        self.places.met(self._dialed.address, welcome.pool, welcome.cores, welcome.host)
        return welcome

    def _begin(self, listener: Listener, welcome: Welcome) -> None:
        """Say all that the listener has; from then on whatever is sent goes out."""
        assert self._dialed is not None
        with self.lock:
            self._outbox.clear()
            self._deferred.clear()
            with _understood("a welcome"):
                said = [*listener.opening(welcome), Ready()]
            self.up, self.fault = True, ""
            for message in said:
                try:
                    self._write(frame(flat(message)))
                except LinkBroken as error:  # as when it was to be said first: all else must be said all the same
                    log.warning("a %s is not said to the core: %s", type(message).__name__, error)
            self._renew_s = time.monotonic() + RENEW_S
        for fields in self._early:
            self._hear(listener, fields)

    # Sending

    def send(self, message: Message) -> bool:
        """Send a message; returns whether it went on its way. Waits for nothing.

        Raises:
            LinkBroken: It cannot be a frame.
        """
        data = frame(flat(message))
        if is_collecting():
            self._deferred.append(data)
            self._waker.wake()
            return True
        with self.lock:
            if not self.up:
                if self._thread is None and self._listener is not None and not self._stopping:
                    self._start_thread()  # in a forked child
                return False
            self._write(data)
        return True

    def _write(self, data: bytes) -> None:
        """Send what the network takes now, and leave the rest to the thread; under the lock."""
        assert self._dialed is not None
        sent = 0
        try:
            raw = self._dialed.codec.encode(data)
        except OSError as error:  # TLS is at its end
            self.drop(_told(error))
            return
        if not self._outbox:
            try:
                sent = self._dialed.socket.send(raw)
            except (BlockingIOError, InterruptedError):
                pass
            except OSError:  # the thread finds out, too
                return
            if sent == len(raw):
                return
        self._outbox += raw[sent:]
        if len(self._outbox) > MOST_HELD_BYTES:
            with contextlib.suppress(OSError):  # it is at its end by itself
                self._dialed.socket.shutdown(socket.SHUT_RDWR)
        self._waker.wake()

    def _flush(self) -> None:
        assert self._dialed is not None
        with self.lock:
            while self._deferred:
                self._write(self._deferred.popleft())
            if self._outbox:
                with contextlib.suppress(BlockingIOError, InterruptedError):
                    del self._outbox[: self._dialed.socket.send(self._outbox)]

    # The thread

    def _run(self) -> None:
        pause_s = 0.0
        try:
            while not self._stopping:
                if self._dialed is None and not self._again(pause_s):
                    pause_s = _longer(pause_s)
                    continue
                began_s = time.monotonic()
                why = self._talk()
                pause_s = 0.0 if time.monotonic() - began_s > LONGEST_PAUSE_S else _longer(pause_s)
                self._lost(why)
        finally:
            self._hang_up()

    def _again(self, pause_s: float) -> bool:
        """Wait, and connect again; returns whether that went well."""
        until_s = time.monotonic() + pause_s * random.uniform(0.5, 1.5)
        while (left_s := until_s - time.monotonic()) > 0 and self._is_wanted():
            self._waker.sleep(min(left_s, TICK_S))
            self._look()
        if not self._is_wanted() or (listener := self._listened) is None:
            return False
        hello, listener = listener.hello(), None  # it may be dropped while a core is looked for
        race = Race(self.places, self._key, hello, self._waker.wake)
        try:
            while (greeted := race.take()) is None:
                self._failed(race)
                self._waker.sleep(TICK_S)
                race.look()
                self._look()
                if not self._is_wanted():
                    return False
            self._look()  # what a lease held that is over ends before the next one begins
            return self._joins(greeted)
        finally:
            race.stop()

    def _joins(self, greeted: Greeted) -> bool:
        """Go on with a connection that was made; returns whether that goes well."""
        try:
            welcome = self._took(greeted)
            if (listener := self._listened) is not None:
                self._begin(listener, welcome)
        except (OSError, LinkBroken, ConfigError) as error:
            self.fault = _told(error)
            self._hang_up()
            return False
        self._refusal, self.beginning = None, False
        self._look()
        return True

    def _failed(self, race: Race) -> None:
        """Note what came of a race so far."""
        if (fault := race.fault) is None or not race.all_failed:
            return
        self.fault = _told(fault)
        if type(fault) is not type(self._refusal) and isinstance(fault, ConfigError):
            log.warning("the link to the core cannot be made: %s", fault)
        self._refusal = fault
        began, self.beginning = self.beginning, False
        if began and (listener := self._listened) is not None:
            listener.disconnected(self.fault)

    @property
    def _listened(self) -> Listener | None:
        return None if self._listener is None else self._listener()

    def _is_wanted(self) -> bool:
        """Whether there is still something that the link is for."""
        self._stopping = self._stopping or self._listened is None
        return not self._stopping

    def _look(self) -> None:
        if (listener := self._listened) is not None:
            listener.looked()

    def _talk(self) -> str:
        """Read and renew until the connection ends; returns why it did."""
        assert self._dialed is not None
        poll, network = select.poll(), self._dialed.socket
        poll.register(self._waker, select.POLLIN)
        poll.register(network, select.POLLIN)
        fd, waits = network.fileno(), select.POLLIN
        while not self._stopping:
            wanted = select.POLLIN | (select.POLLOUT if self._outbox else 0)
            if wanted != waits:
                poll.modify(fd, wanted)
                waits = wanted
            now = time.monotonic()
            found = dict(poll.poll(max(0.0, 1000 * (min(self._renew_s, self._heard_s + SILENT_S) - now))))
            try:
                if self._waker.fileno() in found:
                    self._waker.awake()
                if self._outbox or self._deferred:
                    self._flush()
                if found.get(fd, 0) & ~select.POLLOUT:
                    self._read(network)
            except (OSError, LinkBroken, ConfigError) as error:
                return _told(error)
            now = time.monotonic()
            if now - self._heard_s > SILENT_S:
                return f"the core has been silent for {now - self._heard_s:.1f} s"
            if now - self.confirmed_s > UNCONFIRMED_S and self.places.has_others:
                return f"the core has confirmed nothing for {now - self.confirmed_s:.1f} s, as without its lease"
            if now >= self._renew_s:
                self._renew(now)
                self._look()
            if self._broken:
                return self._broken
        with self.lock, contextlib.suppress(OSError):
            self._write(frame(flat(Bye())))
            network.setblocking(True)
            network.settimeout(CLOSE_S)
            network.sendall(self._outbox)
        return "this Orla was closed"

    def _read(self, network: socket.socket) -> None:
        try:
            data = network.recv(READ_BYTES)
        except (BlockingIOError, InterruptedError):
            return
        if not data:
            raise ConnectionResetError("the core hung up")
        assert self._dialed is not None
        with self.lock:
            data = self._dialed.codec.decode(data)
            if answer := self._dialed.codec.pending():
                self._outbox += answer
        self._heard_s = time.monotonic()
        if (listener := self._listened) is None:
            self._stopping = True
            return
        for fields in self._reader.feed(data):
            self._hear(listener, fields)

    def _hear(self, listener: Listener, fields: Sequence[object]) -> None:
        message = read(fields)
        if isinstance(message, Renewed):
            sent_s = self._renewals.pop(message.number, None)
            if sent_s is not None:
                self.confirmed_s = max(self.confirmed_s, sent_s)
        if isinstance(message, Welcome) and self._dialed is not None:
            self.places.met(self._dialed.address, message.pool, message.cores, message.host)
        if isinstance(message, Bye):
            raise ConnectionResetError(f"the core goes{': ' if message.reason else ''}{message.reason}")
        if message is not None:
            with _understood(f"a {type(message).__name__}"):
                listener.heard(message)

    def _renew(self, now: float) -> None:
        with self.lock:
            number, self.number = self.number, self.number + 1
            self._renewals[number] = now
            self._renewals.pop(number - KEEP_RENEWALS, None)  # of a core that answers none
            self._write(frame(flat(Renew(number))))
        self._renew_s = now + RENEW_S

    def _lost(self, why: str) -> None:
        self._hang_up()
        self.lost_s, self.fault, self._broken = time.monotonic(), why, ""
        if self._stopping:
            return
        log.info("the link to the core was lost: %s", why)
        if (listener := self._listened) is not None:
            listener.disconnected(why)

    def drop(self, why: str) -> None:
        """Give the connection up for another one."""
        self._broken = why
        self._waker.wake()

    def _hang_up(self) -> None:
        with self.lock:
            self.up, dialed, self._dialed = False, self._dialed, None
            self._outbox.clear()
        if dialed is not None:
            dialed.socket.close()

    # The end

    def stop(self, wait_s: float = CLOSE_S) -> None:
        """End the connection and the thread, after a goodbye; waits for that unless a collector runs. Idempotent."""
        thread, self._stopping = self._thread, True
        self._waker.wake()
        if thread is None:
            self._hang_up()
        elif thread is not threading.current_thread() and not is_collecting():
            thread.join(wait_s)

    def __del__(self) -> None:
        self._waker.close()

    def forked(self) -> None:
        """Leave the parent's connection to it, in a child; another one is made when something is to be sent."""
        dialed, self._dialed = self._dialed, None
        if dialed is not None:
            dialed.socket.close()  # this process's copy of it
        self._waker.close()
        self._waker = Waker()
        self.lock = threading.RLock()
        self.replica, self.up, self._thread = secrets.token_hex(8), False, None
        self.beginning = True
        self._outbox, self._deferred = bytearray(), deque()
        self.fault, self.lost_s = "this process was forked just now", time.monotonic()
        self.places.forked()
        if (listener := self._listened) is not None:
            listener.forked()


@contextlib.contextmanager
def _understood(what: str) -> Iterator[None]:
    """Let what is wrong inside a core's message, whatever that leads to, cost the connection and not the link."""
    try:
        yield
    except (OSError, LinkBroken, ConfigError):
        raise
    except Exception as error:
        raise LinkBroken(f"the core sent {what} that cannot be read: {error!r}") from error


def _told(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _longer(pause_s: float) -> float:
    return min(max(FIRST_PAUSE_S, 2 * pause_s), LONGEST_PAUSE_S)


_links: weakref.WeakSet[Link] = weakref.WeakSet()


def _after_fork() -> None:
    for link in list(_links):
        link.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
