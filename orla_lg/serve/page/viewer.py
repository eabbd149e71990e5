"""One open page: what waits to be sent to it, within bounds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from orla_lg.serve.access.access import Caller

MOST_PENDING_BYTES = 1 << 20
"""A viewer for which more waits is cut off."""
SEND_PATIENCE_S = 10.0
"""A viewer that takes nothing for so long is cut off."""

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]


class PageViewer:
    """One viewer. Of the event loop.

    Args:
        caller: What its key allows.
        session: Of its sign-in; ``None``: it sent its key.
        workflow: The number of the workflow whose calls it wants one by one.
        cut: Ends its connection at once.
    """

    def __init__(
        self, caller: Caller, session: str | None, workflow: int | None, cut: Callable[[], None] = lambda: None
    ) -> None:
        self.caller, self.session, self.workflow = caller, session, workflow
        self._cut = cut
        self._pending: deque[bytes] = deque()
        self._bytes = 0
        self._more = asyncio.Event()
        self._ended = False
        self._sending_since_s: float | None = None
        self.sent_bytes = 0

    @property
    def is_stuck(self) -> bool:
        """Whether it does not take what is sent now."""
        return self._sending_since_s is not None

    def put(self, message: bytes) -> None:
        """Have a message sent; where too much waits already, the viewer is cut off."""
        if self._ended:
            return
        self._pending.append(message)
        self._bytes += len(message)
        if self._bytes > MOST_PENDING_BYTES:
            self.cut_off()
        self._more.set()

    def end(self, message: bytes = b"") -> None:
        """End the stream after what waits, with a last message."""
        if message:
            self.put(message)
        self._ended = True
        self._more.set()

    def cut_off(self) -> None:
        """Drop what waits, and end the connection at once."""
        self._pending.clear()
        self._bytes, self._ended = 0, True
        self._more.set()
        self._cut()

    def look(self, now_s: float) -> None:
        """Cut it off if it has taken nothing for too long."""
        if self._sending_since_s is not None and now_s - self._sending_since_s > SEND_PATIENCE_S:
            self.cut_off()

    async def write(self, send: Send) -> None:
        """Send what is put, until the end."""
        loop = asyncio.get_running_loop()
        while True:
            await self._more.wait()
            self._more.clear()
            while self._pending:
                piece = b"".join(self._pending)
                self._pending.clear()
                self._sending_since_s = loop.time()
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                self._sending_since_s = None
                self._bytes = sum(map(len, self._pending))
                self.sent_bytes += len(piece)
            if self._ended:
                return
