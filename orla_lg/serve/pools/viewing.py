"""The other pools as one core sees them: a connection to each of their cores, by which views of backends come.

A core pushes what changed of its backends, at most every 100 ms, to whatever looks on (``serve.link.host``). Here the
views stand beside those of this core's own backends, and a mapper may choose by them; the choice is the other core's
to carry out.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from orla_lg.core.placement.elsewhere import ElsewhereBackends
from orla_lg.errors import ConfigError
from orla_lg.link.connection import Link
from orla_lg.link.dialing import ServerAddress, addresses
from orla_lg.link.messages import PROTOCOL, Flat, Hello, Message, View, Welcome
from orla_lg.link.places import CorePlace
from orla_lg.link.views import PushedView, read_view
from orla_lg.link.whereabouts import here
from orla_lg.serve.pools.secret import CoreSecret

log = logging.getLogger("orla_lg")


class PoolViewer:
    """What hears of one other pool (``link.listener.Listener``), in its link's thread.

    Args:
        pool: By name.
        link: To its core.
        seen: Takes in how its backends are seen now; none: they are not.
        backends: Where the pool's backends are configured.
        version: Of the package.
    """

    def __init__(
        self,
        pool: str,
        link: Link,
        seen: Callable[[str, Sequence[PushedView] | None], None],
        backends: ElsewhereBackends,
        version: str,
    ) -> None:
        self.pool, self.link = pool, link
        self._seen, self._backends, self._version = seen, backends, version
        self._flats: dict[str, Flat] = {}
        self._views: dict[str, PushedView] = {}

    def hello(self) -> Hello:  # noqa: D102
        return Hello(
            PROTOCOL, self.link.replica, self._version, self.link.epoch, (), here(), os.getpid(), pool=self.pool
        )

    def opening(self, welcome: Welcome) -> Sequence[Message]:  # noqa: D102
        self._flats, self._views = {}, {}
        self._take(welcome.views)
        return ()

    def heard(self, message: Message) -> None:  # noqa: D102
        if isinstance(message, View | Welcome):
            self._take(message.views)

    def disconnected(self, why: str) -> None:  # noqa: D102
        self._seen(self.pool, None)

    def looked(self) -> None:
        """Nothing waits here."""

    def forked(self) -> None:
        """A server does not fork."""

    def _take(self, flats: Sequence[Mapping[str, Any]]) -> None:
        """Take in what changed; what an engine said of itself is read where it is another one than before."""
        for flat in flats:
            name = str(flat.get("name"))
            if (backend := self._backends.backend(name)) is None:
                continue
            whole = self._flats[name] = {**self._flats.get(name, {}), **flat}
            known = self._views.get(name)
            if known is None or "probe" in flat:
                self._views[name] = read_view(whole, backend)
            else:
                view = read_view({**whole, "probe": None}, backend).view
                view = replace(view, probe=known.view.probe, models=known.view.models)
                self._views[name] = PushedView(view, whole.get("fault"))
        self._seen(self.pool, list(self._views.values()))


class OtherPools:
    """Keeps a viewer of each other pool whose core the directory names.

    Args:
        pool: That this core decides for.
        backends: Those of other pools.
        secret: By which cores know each other.
        version: Of the package.
    """

    def __init__(self, pool: str, backends: ElsewhereBackends, secret: CoreSecret, version: str) -> None:
        self.backends = backends
        self.places: Mapping[str, CorePlace] = {}
        """By pool, as the directory has them."""
        self._pool, self._secret, self._version = pool, secret, version
        self._lock = threading.Lock()
        self._viewers: dict[str, PoolViewer] = {}
        self._unreached = set[str]()
        backends.reached = self.urls

    def urls(self, pool: str) -> Sequence[str]:
        """Return where a pool's core is reached."""
        place = self.places.get(pool)
        return () if place is None else place.urls

    def connected(self) -> dict[str, bool]:
        """Return for each other pool whether its core is connected."""
        viewers = dict(self._viewers)
        return {pool: pool in viewers and viewers[pool].link.up for pool in self.backends.pools}

    def follow(self, places: Sequence[CorePlace]) -> None:
        """Connect to the cores that stand in the directory, and let go of pools that are none any more.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        self.places = {place.pool: place for place in places if place.epoch}
        for pool in [pool for pool in self._viewers if pool not in self.backends.pools]:
            self._viewers.pop(pool).link.stop(0.0)
        for pool in self.backends.pools:
            place = self.places.get(pool)
            if place is None or pool == self._pool or not (found := self._reachable(place)):
                continue
            known = self._viewers.get(pool)
            if known is None or known.link.places.named != found:
                if known is not None:
                    known.link.stop(0.0)
                link = Link(found, self._secret.get(), pool=pool)
                viewer = self._viewers[pool] = PoolViewer(pool, link, self._saw, self.backends, self._version)
                link.begin(viewer)

    def _reachable(self, place: CorePlace) -> tuple[ServerAddress, ...]:
        """Return those of a core's addresses that the secret may go to."""
        found = list[ServerAddress]()
        for url in place.urls:
            with contextlib.suppress(ConfigError):
                found += addresses(url)
        safe = tuple(each for each in found if each.scheme == "https" or (each.is_local and place.host == here()))
        if found and not safe and place.pool not in self._unreached:
            self._unreached.add(place.pool)
            log.warning(
                "the core of pool %r is at %s, which is neither on this machine nor behind TLS: its backends are not "
                "seen here, and mappers that choose freely leave them alone", place.pool, ", ".join(place.urls),
            )  # fmt: skip
        return safe

    def _saw(self, pool: str, views: Sequence[PushedView] | None) -> None:
        with self._lock:
            if views is None:
                self.backends.lost(pool)
            else:
                self.backends.saw([each.view for each in views], pool)

    def close(self) -> None:
        """Look at no other pool any more. Idempotent."""
        viewers, self._viewers = self._viewers, {}
        for viewer in viewers.values():
            viewer.link.stop(0.0)
        for viewer in viewers.values():
            viewer.link.stop()
