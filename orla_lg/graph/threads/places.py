"""Where leases of threads are kept: in a store of the process, or behind a link; a saver's own database is another.

A place answers in the words of ``link.thread_leases``. Each method has a form for threads, which waits, and one for
loops, which is awaited. Calls of one place come to it in their order: a thread that was given back can be taken by
the next call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from orla_lg.core.steps import Steps, adrive
from orla_lg.errors import BackendUnavailable, OrlaError
from orla_lg.link.requests import CoreRequests
from orla_lg.link.thread_leases import (
    Answer,
    Busy,
    LeasesInStore,
    LeaseStore,
    ThreadOwner,
    lease_name,
    read_answer,
)


class WriteRefused(Exception):
    """A write found another owner in its own transaction."""

    def __init__(self, busy: Busy) -> None:
        super().__init__(busy)
        self.busy = busy


class LeasePlace(Protocol):
    """Where leases of threads are kept."""

    compares: bool
    """Whether writes to the saver compare the owner in their own transaction."""

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Answer:
        """Take a thread for *owner*; the lease of the holder *gone*, of a process that has ended, counts as over."""
        ...

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:
        """Renew what was taken in *epoch*."""
        ...

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> None:
        """Let the next run take the thread at once."""
        ...

    async def atake(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Answer:
        """As ``take``."""
        ...

    async def arenew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:
        """As ``renew``."""
        ...

    async def agive_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> None:
        """As ``give_back``."""
        ...

    def fenced(self, inner: Any, thread: str, holder: str) -> Any:
        """Return *inner* as writes compare the owner with *holder* (empty: with none), where the place compares."""
        ...

    def forked(self) -> None:
        """Begin again, in a child."""
        ...


class StorePlace:
    """Leases in a store of this process.

    Args:
        store: A file that several processes open, or one that several machines reach.
    """

    compares = False

    def __init__(self, store: LeaseStore) -> None:
        self._leases = LeasesInStore(store)
        self.forked()

    def forked(self) -> None:  # noqa: D102
        self._aside = ThreadPoolExecutor(1, "orla-thread-leases")  # one: calls keep their order

    async def _away(self, call: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._aside, call, *args)

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Answer:  # noqa: D102
        with _answers():
            return self._leases.take(lease_name(tenant, thread), owner, ttl_s, gone)

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:  # noqa: D102
        with _answers():
            return self._leases.renew(lease_name(tenant, thread), owner, ttl_s, epoch)

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> None:  # noqa: D102
        with _answers():
            self._leases.give_back(lease_name(tenant, thread), owner)

    async def atake(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Answer:  # noqa: D102
        found: Answer = await self._away(self.take, tenant, thread, owner, ttl_s, gone)
        return found

    async def arenew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:  # noqa: D102
        found: Answer = await self._away(self.renew, tenant, thread, owner, ttl_s, epoch)
        return found

    async def agive_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> None:  # noqa: D102
        await self._away(self.give_back, tenant, thread, owner)

    def fenced(self, inner: Any, thread: str, holder: str) -> Any:  # noqa: D102
        raise NotImplementedError


@contextlib.contextmanager
def _answers() -> Iterator[None]:
    """Let a store that does not answer be waited for as a core is."""
    try:
        yield
    except OrlaError as error:
        raise BackendUnavailable(f"the store of thread leases cannot be asked: {error}") from error


class LinkPlace:
    """Leases in the store of the server, asked for over the link; the next core on that store finds them there.

    Args:
        requests: Of the link.
    """

    compares = False

    def __init__(self, requests: CoreRequests) -> None:
        self._requests = requests

    def forked(self) -> None:  # noqa: D102
        ...

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Answer:  # noqa: D102
        return _answer(self._ask("take", tenant, thread, owner, ttl_s=ttl_s, gone=gone))

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:  # noqa: D102
        return _answer(self._ask("renew", tenant, thread, owner, ttl_s=ttl_s, epoch=epoch))

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> None:  # noqa: D102
        self._ask("give_back", tenant, thread, owner)

    async def atake(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Answer:  # noqa: D102
        return _answer(await adrive(self._steps("take", tenant, thread, owner, ttl_s=ttl_s, gone=gone)))

    async def arenew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Answer:  # noqa: D102
        return _answer(await adrive(self._steps("renew", tenant, thread, owner, ttl_s=ttl_s, epoch=epoch)))

    async def agive_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> None:  # noqa: D102
        await adrive(self._steps("give_back", tenant, thread, owner))

    def fenced(self, inner: Any, thread: str, holder: str) -> Any:  # noqa: D102
        raise NotImplementedError

    def _ask(self, what: str, tenant: str | None, thread: str, owner: ThreadOwner, **more: Any) -> Any:
        return self._requests.ask("thread", _said(what, tenant, thread, owner, more))

    def _steps(self, what: str, tenant: str | None, thread: str, owner: ThreadOwner, **more: Any) -> Steps:
        return self._requests.steps("thread", _said(what, tenant, thread, owner, more))


def _said(what: str, tenant: str | None, thread: str, owner: ThreadOwner, more: dict[str, Any]) -> dict[str, Any]:
    return {"what": what, "tenant": tenant, "thread": thread, "owner": owner._asdict(), **more}


def _answer(said: Any) -> Answer:
    return read_answer(said if isinstance(said, dict) else {})
