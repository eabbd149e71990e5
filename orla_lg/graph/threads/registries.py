"""Where leases of threads are kept: in a store of the process, or behind a link; a saver's own database is another.

A registry is asked by steps, which a thread carries out as well as a task; what they come to is an ``Answer`` of
``link.thread_leases``. Calls of one registry come to it in their order: a thread that was given back can be taken by
the next call.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock
from typing import Any, Protocol

from orla_lg.core.steps import Steps
from orla_lg.errors import BackendUnavailable, OrlaError
from orla_lg.graph.threads.steps import BlockingCall
from orla_lg.link.requests import CoreRequests
from orla_lg.link.thread_leases import (
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


class LeaseRegistry(Protocol):
    """Where leases of threads are kept."""

    compares: bool
    """Whether writes to the saver compare the owner in their own transaction."""

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Steps:
        """Take a thread for *owner*; the lease of the holder *gone*, of a process that has ended, counts as over."""
        ...

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Steps:
        """Renew what was taken in *epoch*."""
        ...

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> Steps:
        """Let the next run take the thread at once; without an answer."""
        ...

    def fenced(self, inner: Any, thread: str, holder: str) -> Steps:
        """Return *inner* as writes compare the owner with *holder* (empty: with none), where they do."""
        ...

    def forked(self) -> None:
        """Begin again, in a child."""
        ...


class StoreRegistry:
    """Leases in a store of this process.

    Args:
        store: A file that several processes open, or one that several machines reach.
        opens: Opens it again, for a forked child: what its parent opened is not its own. ``None``: it is the user's.
    """

    compares = False

    def __init__(self, store: LeaseStore, opens: Callable[[], LeaseStore] | None = None) -> None:
        self._opens = opens or (lambda: store)
        self.forked()
        self._leases: LeasesInStore | None = LeasesInStore(store)

    def forked(self) -> None:  # noqa: D102
        self._leases = None
        self._opening = Lock()
        self._aside = ThreadPoolExecutor(1, "orla-thread-leases")  # one: calls keep their order

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Steps:  # noqa: D102
        return self._ask(lambda leases: leases.take(lease_name(tenant, thread), owner, ttl_s, gone))

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Steps:  # noqa: D102
        return self._ask(lambda leases: leases.renew(lease_name(tenant, thread), owner, ttl_s, epoch))

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> Steps:  # noqa: D102
        return self._ask(lambda leases: leases.give_back(lease_name(tenant, thread), owner))

    def _ask(self, what: Callable[[LeasesInStore], Any]) -> Steps:
        """Ask the store; one that does not answer is waited for as a core is."""
        try:
            return (yield BlockingCall(lambda: what(self._opened()), self._aside))
        except OrlaError as error:
            raise BackendUnavailable(f"the store of thread leases cannot be asked: {error}") from error

    def _opened(self) -> LeasesInStore:
        with self._opening:
            if self._leases is None:
                self._leases = LeasesInStore(self._opens())
            return self._leases

    def fenced(self, inner: Any, thread: str, holder: str) -> Steps:  # noqa: D102
        raise NotImplementedError


class LinkRegistry:
    """Leases in the store of the server, asked for over the link; the next core on that store finds them there.

    Args:
        requests: Of the link.
    """

    compares = False

    def __init__(self, requests: CoreRequests) -> None:
        self._requests = requests

    def forked(self) -> None:  # noqa: D102
        ...

    def take(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, gone: str) -> Steps:  # noqa: D102
        return self._ask("take", tenant, thread, owner, ttl_s=ttl_s, gone=gone)

    def renew(self, tenant: str | None, thread: str, owner: ThreadOwner, ttl_s: float, epoch: int) -> Steps:  # noqa: D102
        return self._ask("renew", tenant, thread, owner, ttl_s=ttl_s, epoch=epoch)

    def give_back(self, tenant: str | None, thread: str, owner: ThreadOwner) -> Steps:  # noqa: D102
        return self._ask("give_back", tenant, thread, owner)

    def fenced(self, inner: Any, thread: str, holder: str) -> Steps:  # noqa: D102
        raise NotImplementedError

    def _ask(self, what: str, tenant: str | None, thread: str, owner: ThreadOwner, **more: Any) -> Steps:
        asked = {"what": what, "tenant": tenant, "thread": thread, "owner": owner._asdict(), **more}
        said = yield from self._requests.steps("thread", asked)
        return read_answer(said if isinstance(said, dict) else {})
