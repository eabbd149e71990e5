"""The one connection of a store to its Redis: asked by any thread, within a bound, and made by a thread of its own.

A server's loop asks its store as it goes, so an answer may take ``answer_s`` and no more. Whatever takes longer (a
name looked up, TLS, a password, a Redis that loads its log) is done by the line's thread. After one time-out nothing
waits: each further question fails at once until that thread has a connection again, so that an outage costs the loop
one ``answer_s`` altogether.

A write whose time-out is over may still lie in a socket, and be carried out long after another one that followed it.
So each write carries a deadline, by the server's clock, behind which its script refuses it (``late``); and a new
connection is used only once the deadlines of writes without an answer are over. A write that failed here has taken
place by then, or never does.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable
from typing import Any

from orla_lg.serve.store.store import StoreUnavailable

log = logging.getLogger("orla_lg")

ANSWER_S = 0.2
"""The server has so long for each answer: the core's loop waits for it."""

CONNECT_S = 2.0
"""It has so long for each step of a new connection, for which nothing waits."""

AGAIN_S = 0.1
"""Until a connection is tried again that could not be made."""

SLACK_MS = 50
"""That a deadline is later than its answer is waited for: clocks are read in milliseconds, and run unevenly."""

TURN_S = 2.0
"""A thread waits so long for others that are answered."""

MOST_TRIES = 3

DEADLINE = object()
"""In a command that writes: where its deadline belongs."""


class RedisLine:
    """A connection that is there, or that is not waited for.

    Args:
        make: Returns a connection of redis-py that is not connected yet.
        begin: Asks of a new connection what must be known before it is used; whatever it raises ends the connection.
        place: As messages name the server.
        answer_s: How long an answer may take.
        again_s: How long after a fault a connection is tried again.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        begin: Callable[[Any], None],
        place: str,
        *,
        answer_s: float = ANSWER_S,
        again_s: float = AGAIN_S,
    ) -> None:
        self._make, self._begin, self._place = make, begin, place
        self._answer_s, self._again_s = answer_s, again_s
        self._turn = threading.Lock()
        self._state = threading.Condition()
        """Guards what follows."""
        self._connection: Any = None
        self._fault: Exception | None = None
        """Why there is none, once that is known: nothing is waited for then."""
        self._ended = threading.Event()
        self._ahead_ms = 0.0
        """By how much the server's clock is before this process's monotonic one, at most."""
        self._dead_ms = 0
        """When the last write that was given up is too late, by the server's clock."""
        self._pid = os.getpid()
        self._thread = threading.Thread(target=self._keep, name="orla-store-line", daemon=True)
        self._thread.start()

    @property
    def fault(self) -> Exception | None:
        """Why there is no connection; ``None``: there is one, or it is being made."""
        return self._fault

    def close(self) -> None:
        """Let the connection go. Idempotent."""
        with self._state:
            self._ended.set()
            connection, self._connection = self._connection, None
            self._state.notify_all()
        if self._pid == os.getpid() and connection is not None:
            is_mine = self._turn.acquire(timeout=self._answer_s)  # another thread may read from it
            connection.disconnect()
            if is_mine:
                self._turn.release()
        if self._thread is not threading.current_thread():
            self._thread.join(CONNECT_S)

    # Questions

    def ask(self, *command: Any) -> Any:
        """Return what the server answers. What only reads is asked again where the connection ended before that.

        Args:
            command: As redis-py packs it; what writes has ``DEADLINE`` where its deadline belongs.

        Raises:
            StoreUnavailable: It did not answer in time, or there is no connection.
            redis.ResponseError: It answered that it will not.
        """
        import redis
        from redis import exceptions

        # Whatever it is whose turn it is waits for no longer than an answer may take, and then none waits any more.
        if not self._turn.acquire(timeout=TURN_S):
            raise StoreUnavailable(f"{self._place} keeps others waiting")
        try:
            until_s = time.monotonic() + self._answer_s
            deadline_ms = self.deadline_ms() if DEADLINE in command else None
            if deadline_ms is not None:
                command = tuple(deadline_ms if each is DEADLINE else each for each in command)
            for tries in range(1, MOST_TRIES + 1):
                connection, is_sent = self._ready(until_s), False
                try:
                    if connection.can_read(0):
                        raise redis.ConnectionError("it said what it was not asked for")
                    is_sent = True
                    connection.send_command(*command)
                    return connection.read_response(timeout=max(0.001, until_s - time.monotonic()))
                except (redis.TimeoutError, redis.AuthenticationError, redis.BusyLoadingError) as error:
                    self._give_up(deadline_ms)
                    self._lose(connection, error)
                    raise StoreUnavailable(f"{self._place}: {said_of(error, self._answer_s)}") from error
                except (exceptions.ReadOnlyError, exceptions.ClusterError, exceptions.MovedError) as error:
                    self._lose(connection, error)  # its name may lead to the right one by now
                    raise
                except (redis.ConnectionError, OSError, ValueError) as error:  # the last: it was closed meanwhile
                    if is_sent:
                        self._give_up(deadline_ms)
                    self._lose(connection, None)
                    if tries == MOST_TRIES or (is_sent and deadline_ms is not None):
                        raise StoreUnavailable(f"{self._place}: {said_of(error, self._answer_s)}") from error
                except redis.ResponseError:  # it was answered
                    raise
                except BaseException:  # no answer, or none that could be read: the next one must not be taken for it
                    if is_sent:
                        self._give_up(deadline_ms)
                    self._lose(connection, None)
                    raise
            raise AssertionError("it was answered, or raised")
        finally:
            self._turn.release()

    def deadline_ms(self) -> int:
        """Return when a write that is asked for now is too late, by the server's clock."""
        return int(time.monotonic() * 1000 + self._ahead_ms + self._answer_s * 1000 + SLACK_MS)

    def _give_up(self, deadline_ms: int | None) -> None:
        """Note that what was sent may be done until then."""
        self._dead_ms = max(self._dead_ms, deadline_ms or 0)

    def learn(self, clock_ms: float, asked_s: float) -> None:
        """Note the server's clock as an answer had it that was asked for at *asked_s*."""
        self._ahead_ms = clock_ms - asked_s * 1000

    def _ready(self, until_s: float) -> Any:
        """Return the connection; waits for one that is being made, and for none that could not be."""
        if self._pid != os.getpid():
            raise StoreUnavailable(f"{self._place} is open in the process that forked")
        with self._state:
            while self._connection is None:
                if self._ended.is_set():
                    raise StoreUnavailable(f"{self._place} is closed")
                if self._fault is None and not self._state.wait(until_s - time.monotonic()):
                    self._fault = self._fault or TimeoutError("it takes long to connect")
                if self._connection is None and self._fault is not None:
                    raise StoreUnavailable(
                        f"{self._place} {lack_of(self._fault)}: {said_of(self._fault, self._answer_s)}"
                    ) from self._fault
            return self._connection

    def _lose(self, connection: Any, fault: Exception | None) -> None:
        """Let a connection go; with a fault nothing waits for the next one."""
        connection.disconnect()
        with self._state:
            if self._connection is connection:
                self._connection, self._fault = None, fault
                self._state.notify_all()

    # Connections

    def _keep(self) -> None:
        """Make a connection whenever there is none."""
        while True:
            with self._state:
                while self._connection is not None and not self._ended.is_set():
                    self._state.wait()
                if self._ended.is_set():
                    return
            connection = self._make()
            try:
                connection.connect()
                self._see_off(connection)
                self._begin(connection)
                connection.socket_timeout = self._answer_s
                connection.update_current_socket_timeout(self._answer_s)
            except Exception as error:  # noqa: BLE001 - without this thread there would be no connection any more
                connection.disconnect()
                with self._state:
                    self._fault = error
                    self._state.notify_all()
                self._ended.wait(self._again_s)
                continue
            with self._state:
                if self._ended.is_set():
                    connection.disconnect()
                    return
                self._connection, self._fault = connection, None
                self._state.notify_all()

    def _see_off(self, connection: Any) -> None:
        """Learn the server's clock, and wait until no write before this connection can be carried out any more."""
        asked_s = time.monotonic()
        connection.send_command("TIME")
        clock_ms = milliseconds(connection.read_response())
        self.learn(clock_ms, asked_s)
        left_s = (self._dead_ms - clock_ms) / 1000
        if left_s > 0:
            self._ended.wait(min(left_s, 2 * self._answer_s + SLACK_MS / 1000))


def milliseconds(found: Any) -> float:
    """Return the answer to ``TIME`` as one number."""
    seconds, micros = found
    return int(seconds) * 1000 + int(micros) / 1000


def is_refusal(error: BaseException) -> bool:
    """Whether a server answered that the user or the password is wrong."""
    import redis

    return isinstance(error, redis.AuthenticationError) or f"{error}".startswith(("NOAUTH", "WRONGPASS"))


def lack_of(error: BaseException) -> str:
    """Return what there is instead of a connection."""
    return "refuses the connection" if is_refusal(error) else "is away"


def said_of(error: BaseException, answer_s: float) -> str:
    """Return a fault and what would be right, for people; nothing of a password."""
    import redis

    text = " ".join(str(error).split())[:300] or type(error).__name__
    if isinstance(error, redis.TimeoutError):
        return f"no answer within {answer_s:g} s ({text}); nothing waits for it until it answers"
    if is_refusal(error):
        if any(said in text for said in NO_PASSWORD):
            text = "it wants a password, and none was given"
        return f"{text}; user and password stand in its URL, or the password in {PASSWORD_PLACE}"
    for kind, right in RIGHT.items():
        if text.startswith(kind) or type(error).__name__ == kind:
            return f"{text}; {right}"
    return text


NO_PASSWORD = ("NOAUTH", "HELLO must be called with the client already authenticated", "Authentication required")
"""What a server says to who gives none; redis-py leaves the first word out."""

PASSWORD_PLACE = "the variable that [serve] store_password_env names (ORLA_STORE_PASSWORD where it names none)"

RIGHT = {
    "READONLY": "it is a replica: the URL must name the server that is written to",
    "ReadOnlyError": "it is a replica: the URL must name the server that is written to",
    "LOADING": "it reads its log, and takes questions once it has",
    "BusyLoadingError": "it reads its log, and takes questions once it has",
    "MISCONF": "it cannot write its file; is its disk full?",
    "OOM": "its memory is full: maxmemory must hold all that it has",
    "OutOfMemoryError": "its memory is full: maxmemory must hold all that it has",
    "NOPERM": "its user may not: docs/store.md says what it needs",
    "NoPermissionError": "its user may not: docs/store.md says what it needs",
    "MOVED": "it is a node of a cluster that has other slots: the URL must name the node that it points to",
    "MovedError": "it is a node of a cluster that has other slots: the URL must name the node of that slot",
    "CLUSTERDOWN": "its cluster is down",
    "ClusterDownError": "its cluster is down",
}
"""What would be right, by the first word of an answer, or by redis-py's class, which leaves that word out."""
