"""What wakes a thread that waits for its socket."""

from __future__ import annotations

import contextlib
import select
import socket

READ_BYTES = 4096


class Waker:
    """A pair of sockets: one is waited for, the other one is written to by any thread."""

    def __init__(self) -> None:
        self._in, self._out = socket.socketpair()
        self._in.setblocking(False)
        self._out.setblocking(False)

    def fileno(self) -> int:
        """Return what to wait for."""
        return self._in.fileno()

    def wake(self) -> None:
        """Wake the thread; takes no lock."""
        with contextlib.suppress(OSError):  # it is awake, or gone
            self._out.send(b"\0")

    def awake(self) -> None:
        """Note that it is awake."""
        with contextlib.suppress(OSError):
            self._in.recv(READ_BYTES)

    def sleep(self, seconds: float) -> None:
        """Wait until it is woken, for at most so long."""
        poll = select.poll()
        poll.register(self._in, select.POLLIN)
        poll.poll(1000 * seconds)
        self.awake()

    def close(self) -> None:
        """Close both."""
        self._in.close()
        self._out.close()
