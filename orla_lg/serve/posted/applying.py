"""What is posted, changed: tried out, stored, applied; and what another process changed in the store, applied too.

A change is checked against the running core before it is stored, so that what is refused leaves nothing behind; it is
stored before it is applied, so that a core that dies in between comes back with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from typing import TypeVar

from orla_lg.errors import ConfigError, OrlaError, shown
from orla_lg.serve.posted.allowed import Allowed
from orla_lg.serve.posted.book import Posted, PostedBook, PostedItems
from orla_lg.serve.posted.guarding import policy_of
from orla_lg.serve.posted.items import PostedBackend, PostedItem, PostedKind, PostedPolicy, PostedSetting
from orla_lg.serve.posted.joining import NamedByFile, check_free, named_by
from orla_lg.serve.reloading import Changes, Reloader
from orla_lg.serve.store.store import Store, StoreUnavailable

log = logging.getLogger("orla_lg")

T = TypeVar("T", bound=PostedItem)

Applied = Callable[[PostedItems], None]
"""Called on the server's loop with all items after each change."""

NOUNS: Mapping[PostedKind, str] = {
    kind: "policy" if kind is PostedKind.POLICY else kind.value.removesuffix("s") for kind in PostedKind
}

RETRY_S = 1.0
"""A store that does not answer is read again so soon."""


class NotPosted(OrlaError):
    """There is no item of that name."""


class PostedThings:
    """All that is posted to one server. Of its loop, except where a method says otherwise.

    Args:
        store: Where it is kept.
        reloader: Applies it.
        allowed: What may be posted.
        lock: Held while the configuration changes.
        refreshed: Called when backends came or went.
        own: The part of the store that is this core's pool's, where its posted backends are; ``None``: there are no
            pools.
    """

    def __init__(
        self,
        store: Store,
        reloader: Reloader,
        allowed: Allowed,
        lock: asyncio.Lock,
        refreshed: Callable[[], None] = lambda: None,
        own: Store | None = None,
    ) -> None:
        self.book = PostedBook(store, own)
        self.reloader = reloader
        self.allowed = allowed
        self.followers: list[Applied] = []
        self._lock = lock
        self._refreshed = refreshed
        self._said = dict[str, str]()
        """Faults that were logged."""

    @property
    def items(self) -> PostedItems:
        """All items as they are applied; a policy, a skill or a workflow is applied by what follows."""
        return self.reloader.posted.items

    # Changes from here

    async def put(self, item: T, *, expected: int | None = None) -> Posted[T]:
        """Store an item and apply it.

        Args:
            item: The item.
            expected: The version that is overwritten, ``ABSENT`` for none; ``None``: whichever there is.

        Raises:
            NamedByFile: The configuration file names it.
            ConfigError, MappingError: It cannot be applied.
            Conflict: Another version is stored.
            PostedFull: There is no room.
            StoreUnavailable: The store does not answer.
        """
        check_free(self.reloader.file, item)
        if isinstance(item, PostedPolicy):
            policy_of(item)
        await self._check_urls(item)
        async with self._lock:
            await asyncio.to_thread(self.book.refresh)
            trial = self.book.items.with_item(item)
            found = await self._tried(trial)
            if isinstance(item, PostedBackend) and (fault := _faults(found).get(item.name)) is not None:
                raise ConfigError(fault)
            stored = await asyncio.to_thread(self.book.put, item, expected=expected)
            await self._stored(found, trial)
        return stored

    async def remove(self, model: type[PostedItem], name: str, *, expected: int | None = None) -> None:
        """Remove an item, and apply that.

        Raises:
            NamedByFile: The configuration file names it.
            NotPosted: There is none.
            ConfigError: It cannot be taken out of the running core.
            Conflict: Another version is stored.
            StoreUnavailable: The store does not answer.
        """
        kind = model.kind_
        async with self._lock:
            await asyncio.to_thread(self.book.refresh)
            items = self.book.items
            if items.get(model, name) is None and name not in items.broken(kind):
                if said := named_by(self.reloader.file, kind, name):
                    raise NamedByFile(said)
                raise NotPosted(f"there is no {NOUNS[kind]} {shown(name)}")
            trial = items.without(kind, name)
            found = await self._tried(trial)
            await asyncio.to_thread(self.book.remove, kind, name, expected=expected)
            await self._stored(found, trial)

    async def _check_urls(self, item: PostedItem) -> None:
        if isinstance(item, PostedBackend) and item.api_key_env_var:
            self.allowed.check_key(item.api_key_env_var, item.endpoint)
        fields = {PostedBackend: ("endpoint", "cost_source"), PostedSetting: ("url",)}.get(type(item), ())
        for field in fields:
            if url := getattr(item, field):
                await asyncio.to_thread(self.allowed.check_url, field, url, resolves=True)

    # Changes from elsewhere

    async def refresh(self) -> None:
        """Apply what the store has; what cannot be applied is logged, and left out.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        async with self._lock:
            await asyncio.to_thread(self.book.refresh)
            if self.book.items is self.items:
                return
            try:
                found = await self._tried(self.book.items)
            except OrlaError as error:
                log.error("what is posted cannot be applied: %s", error)
                return
            self._apply(found, self.book.items)

    @contextlib.asynccontextmanager
    async def followed(self, tasks: asyncio.TaskGroup) -> AsyncIterator[None]:
        """Apply what other processes change in the store, while the block runs."""
        loop, changed = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            with contextlib.suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(changed.set)

        end, task = self.book.watch(wake), tasks.create_task(self._follow(changed))
        try:
            yield
        finally:
            end()
            task.cancel()

    async def _follow(self, changed: asyncio.Event) -> None:
        while True:
            await changed.wait()
            changed.clear()
            try:
                await self.refresh()
            except StoreUnavailable as error:
                log.error("what is posted cannot be read: %s", error)
                await asyncio.sleep(RETRY_S)
                changed.set()

    # Within

    async def _tried(self, items: PostedItems) -> Changes:
        """Return what applying *items* would do, tried out.

        Raises:
            ConfigError, MappingError: It cannot be done.
        """
        found = await asyncio.to_thread(self.reloader.look_posted, items)  # it asks new backends what they are
        self.reloader.try_out(found)
        return found

    async def _stored(self, found: Changes, trial: PostedItems) -> None:
        """Apply what was tried out and stored, with what another process stored meanwhile."""
        items = self.book.items
        if not items.says_what(trial):
            try:
                found = await self._tried(items)
            except OrlaError as error:
                log.error("what another process posted cannot be applied: %s", error)
                items = trial
        self._apply(found, items)

    def _apply(self, found: Changes, items: PostedItems) -> None:
        """Apply what was tried out; *items* are the same as they are stored."""
        self.reloader.apply(found, items)
        self.reapplied()
        if found.added or found.removed or found.replaced:
            self._refreshed()

    def reapplied(self) -> None:
        """Have what follows heed all items, after the configuration was loaded again too."""
        posted = self.reloader.posted
        for name, fault in posted.faults.items():
            if self._said.get(name) != fault:
                log.error("posted backend %r is left out: %s", name, fault)
        self._said = dict(posted.faults)
        for follower in self.followers:
            follower(posted.items)


def _faults(found: Changes) -> Mapping[str, str]:
    return {} if found.posted is None else found.posted.faults
