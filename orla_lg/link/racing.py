"""How a link finds its core: all addresses are dialed at once, and the first that welcomes it is taken.

A server that is cut off answers nothing, not even that it is gone; one that is frozen takes a connection and never
answers. So no address waits for another one. Each has a thread of its own for as long as there is no core, and is
tried again after pauses that are short while a standby may be about to take over, and grow then.

Hello is said to one server at a time: two addresses may lead to one core, to which the second one would be a new
connection in the place of the first.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Hashable

from orla_lg.errors import ConfigError
from orla_lg.link.dialing import NotReady, ServerAddress, Unwelcome, dial
from orla_lg.link.following import CoreAddresses, DirectorySource
from orla_lg.link.framing import LinkBroken
from orla_lg.link.greeting import Greeted, greet
from orla_lg.link.messages import Hello

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.02, 1.0
"""Between attempts at one address; each pause is twice the last one, and up to half more or less."""

EAGER_S, EAGER_PAUSE_S = 10.0, 0.1
"""So long after the beginning no pause is longer than that: a standby may be about to take over."""

UNWELCOME_PAUSE_S = 2.0
"""After a server that will not take the link as it is: its keys may be changed."""

STAGGER_S, MOST_STAGGER_S = 0.05, 0.2
"""How much later each next address is tried for the first time: where all is well the first one is taken."""

Fault = OSError | LinkBroken | ConfigError


class Race:
    """The search for a core, from its beginning until one is found or none is wanted any more.

    Args:
        where: It may be.
        key: Of scope ``link``.
        hello: What is said to it.
        wake: Called in a thread of the race when something came of it.
    """

    def __init__(
        self, where: CoreAddresses, key: str | None, hello: Hello, wake: Callable[[], None] = lambda: None
    ) -> None:
        self._faults: dict[Hashable, Fault] = {}
        """Why there was none at a place at the last attempt; the newest stands last."""
        self._where, self._key, self._hello, self._wake = where, key, hello, wake
        self._began_s = time.monotonic()
        self._lock, self._greeting = threading.Lock(), threading.Lock()
        self._over = threading.Event()
        self._found: Greeted | None = None
        self._crash: BaseException | None = None
        self._places = set[Hashable]()
        for source in where.sources:
            self._begin(source.text, self._read, source)
        self._dial_all()

    # Of the thread that wants a core

    @property
    def all_failed(self) -> bool:
        """Whether nothing is left that may still go well at its first attempt."""
        with self._lock:
            return len(self._faults) >= len(self._places)

    @property
    def fault(self) -> Fault | None:
        """Why no core was found so far; what will not take the link goes before what is not there."""
        with self._lock:
            faults = list(self._faults.values())
        if not self._places:
            return NotReady("no core that decides for the pool is known")
        unwelcome = [each for each in faults if isinstance(each, ConfigError)]
        return next(iter(unwelcome or faults[::-1]), None)

    def take(self) -> Greeted | None:
        """Return the connection that was made; the race is over then."""
        if self._crash is not None:
            raise self._crash
        with self._lock:
            found, self._found = self._found, None
        return found

    def look(self) -> None:
        """Dial what was learned meanwhile from elsewhere, too."""
        self._dial_all()

    def stop(self) -> None:
        """Let it be over; a connection that is made all the same is closed. Idempotent."""
        with self._lock:
            self._over.set()
            found, self._found = self._found, None
        if found is not None:
            found.dialed.socket.close()

    # Of its own threads

    def _begin(self, place: Hashable, work: Callable[..., None], *about: object) -> None:
        with self._lock:
            if place in self._places:
                return
            self._places.add(place)
        threading.Thread(target=self._run, args=(work, *about), name="orla-link-dial", daemon=True).start()

    def _run(self, work: Callable[..., None], *about: object) -> None:
        try:
            work(*about)
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            self._crash = error
            self._wake()

    def _dial_all(self) -> None:
        """Begin with the addresses that are not dialed yet."""
        for number, address in enumerate(self._where.addresses()):
            self._begin(_place(address), self._dial, address, min(number * STAGGER_S, MOST_STAGGER_S))

    def _dial(self, address: ServerAddress, pause_s: float) -> None:
        longer_s = 0.0
        while not self._over.wait(pause_s):
            try:
                self._greet(address)
                return
            except (OSError, LinkBroken, ConfigError) as error:
                fault = error
            if isinstance(fault, NotReady) and fault.cores:
                self._where.hinted(address, fault.cores)
                self._dial_all()
            self._failed(_place(address), fault)
            longer_s = self._longer(longer_s)
            pause_s = UNWELCOME_PAUSE_S if isinstance(fault, Unwelcome) else longer_s * random.uniform(0.5, 1.5)

    def _greet(self, address: ServerAddress) -> None:
        dialed = dial(address, self._key, self._hello.version)
        with self._greeting:
            if self._over.is_set():
                dialed.socket.close()
                return
            found = greet(dialed, self._hello, self._where.pool)
            with self._lock:
                is_wanted = not self._over.is_set()
                self._found = found if is_wanted else None
                self._over.set()
        if not is_wanted:
            found.dialed.socket.close()
        self._wake()

    def _read(self, source: DirectorySource) -> None:
        """Look in a store's directory, again and again."""
        pause_s = 0.0
        while not self._over.wait(pause_s):
            try:
                if not self._where.read(source):
                    raise NotReady(f"the store at {source.text} names no core that may be followed")
            except OSError as error:
                self._failed(source.text, error)
            else:
                with self._lock:
                    self._faults.setdefault(source.text, NotReady(f"no core that {source.text} names answers"))
                self._dial_all()
            pause_s = max(EAGER_PAUSE_S, self._longer(pause_s))

    def _failed(self, place: Hashable, fault: Fault) -> None:
        with self._lock:
            self._faults.pop(place, None)
            self._faults[place] = fault
        self._wake()

    def _longer(self, pause_s: float) -> float:
        is_eager = time.monotonic() - self._began_s < EAGER_S
        return min(max(FIRST_PAUSE_S, 2 * pause_s), EAGER_PAUSE_S if is_eager else LONGEST_PAUSE_S)


def _place(address: ServerAddress) -> Hashable:
    return address._replace(text="")
