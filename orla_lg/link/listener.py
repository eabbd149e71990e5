"""What a link tells of, and asks: the replica behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from orla_lg.link.messages import Hello, Message, Welcome


class Listener(Protocol):
    """What hears of a link; called in its thread."""

    def hello(self) -> Hello:
        """Return what a connection begins with."""
        ...

    def opening(self, welcome: Welcome) -> Sequence[Message]:
        """Take a welcome in, and return all that is to be said before ``Ready``; under the link's lock.

        Raises:
            LinkBroken: It cannot be taken.
        """
        ...

    def heard(self, message: Message) -> None:
        """Take a message in."""
        ...

    def disconnected(self, why: str) -> None:
        """Note that the connection ended."""
        ...

    def looked(self) -> None:
        """Look at what waits; often while there is no connection, else now and then."""
        ...

    def forked(self) -> None:
        """Begin afresh in a child: what the parent has is not its own."""
        ...
