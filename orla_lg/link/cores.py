"""The cores that a replica knows: one for each pool, or the only one of a server without pools."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orla_lg.core.policies import ANY_BACKEND
from orla_lg.errors import ConfigError, did_you_mean, shown
from orla_lg.link.requests import CoreRequests
from orla_lg.link.side import CoreSide


class Cores:
    """Which core decides about which backend. Read in any thread, changed under the links' lock."""

    home: CoreSide
    """The one that was met first."""

    def __init__(self) -> None:
        self.several = False
        """Whether there are pools."""
        self.by_pool: Mapping[str, CoreSide] = {}
        self.owners: Mapping[str, CoreSide] = {}
        """By backend; both tables are replaced, never changed."""

    def begin(self, home: CoreSide, backends: Iterable[str]) -> None:
        """Begin with the core that was met first, and its backends."""
        self.home, self.by_pool, self.owners = home, {home.pool: home}, dict.fromkeys(backends, home)

    def all(self) -> Sequence[CoreSide]:
        """Return all of them, the first that was met first."""
        return list(self.by_pool.values())

    def of(self, backend: str) -> CoreSide:
        """Return the one that decides about a backend; the first for one that is unknown."""
        return self.owners.get(backend, self.home)

    # How they come and go; under the links' lock

    def add(self, side: CoreSide) -> None:
        """Note the core of another pool."""
        self.by_pool = {**self.by_pool, side.pool: side}
        self.several = True

    def remove(self, side: CoreSide) -> None:
        """Forget the core of a pool that is none any more."""
        self.by_pool = {pool: each for pool, each in self.by_pool.items() if each is not side}
        self.owners = {name: each for name, each in self.owners.items() if each is not side}

    def owns(self, backend: str, pool: str) -> None:
        """Note which pool a backend is in, and so which core decides about it."""
        self.owners = {**self.owners, backend: self.by_pool[pool]}

    def disowns(self, backend: str) -> None:
        """Note that there is no such backend any more."""
        self.owners = {name: each for name, each in self.owners.items() if name != backend}

    # Which of them is asked (``requests.RequestRoutes``)

    def asked_of(self, backend: str) -> CoreRequests:
        """Return the requests to the core that decides about a backend.

        Raises:
            ConfigError: None does; a single core says so itself.
        """
        if self.several and backend not in self.owners:
            raise ConfigError(f"unknown backend {shown(backend)}{did_you_mean(str(backend), self.owners)}")
        return self.of(backend).requests

    def asked_of_all(self) -> Sequence[CoreRequests]:
        """Return the requests to each core."""
        return [side.requests for side in self.all()]

    def own(self, asked: CoreRequests, table: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the entries of a table by backend that concern one core's backends, or any backend."""
        if not self.several:
            return table
        return {name: each for name, each in table.items() if name == ANY_BACKEND or self.of(name).requests is asked}
