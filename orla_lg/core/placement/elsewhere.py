"""Backends of other pools: named by the mapping and seen by mappers here, and decided about by their own cores."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from orla_lg.core.engine.backend import Backend
from orla_lg.core.placement.view import BackendView, served_names
from orla_lg.errors import MappingError


class BackendElsewhere(MappingError):
    """A call is mapped to a backend of another pool: it enters at the core of that pool, and nowhere else.

    Args:
        backend: By name.
        pool: Of the backend.
        where: URLs of the core that decides for the pool; empty where none is known.
    """

    def __init__(self, backend: str, pool: str, where: Sequence[str] = ()) -> None:
        at = f"its core is reached at {where[0]}" if where else "no core decides for that pool now"
        super().__init__(f"backend {backend!r} is of pool {pool!r}, which is not served here: {at}")
        self.backend, self.pool, self.where = backend, pool, tuple(where)


class ElsewhereBackends:
    """The backends that one core does not decide about and its mappings may name. Any thread may look.

    Until the core of a pool was heard of, and while it is not, its backends are seen as paused: a mapper that chooses
    freely leaves them alone, and one that names them has its call wait there.

    Args:
        pools: By pool, its backends as they are configured.
        order: The names of all backends, in the order of the configuration.
        reached: Returns the URLs of a pool's core.
    """

    def __init__(
        self,
        pools: Mapping[str, Sequence[Backend]],
        order: Sequence[str] = (),
        reached: Callable[[str], Sequence[str]] = lambda pool: (),
    ) -> None:
        self.reached = reached
        self._seen: dict[str, BackendView] = {}
        """By backend, as its core saw it last."""
        self.configure(pools, order)

    def configure(self, pools: Mapping[str, Sequence[Backend]], order: Sequence[str]) -> None:
        """Let these be all of them; what was seen of those that stay stands."""
        self.pools = {pool: tuple(backends) for pool, backends in pools.items()}
        self.pool_of = {backend.name: pool for pool, backends in pools.items() for backend in backends}
        self._order = {name: number for number, name in enumerate(order)}
        views = {backend.name: view_unseen(backend, pool) for pool in pools for backend in pools[pool]}
        self._seen = {name: self._seen.get(name, view) for name, view in views.items()}

    def __contains__(self, name: object) -> bool:
        return name in self.pool_of

    def error(self, name: str) -> BackendElsewhere:
        """Return what a call ends with that is mapped to one of them here."""
        pool = self.pool_of[name]
        return BackendElsewhere(name, pool, self.reached(pool))

    def backend(self, name: str) -> Backend | None:
        """Return one of them as it is configured."""
        pool = self.pool_of.get(name)
        return next((each for each in self.pools.get(pool or "", ()) if each.name == name), None)

    # How they are seen

    def saw(self, views: Sequence[BackendView], pool: str) -> None:
        """Take in how the core of a pool sees its own."""
        mine = {view.name: replace(view, pool=pool) for view in views if self.pool_of.get(view.name) == pool}
        self._seen = {name: mine.get(name, view) for name, view in self._seen.items()}

    def lost(self, pool: str) -> None:
        """See the backends of a pool as paused until its core is heard of again."""
        self._seen = {
            name: replace(view, paused=True) if view.pool == pool else view for name, view in self._seen.items()
        }

    def views(self) -> list[BackendView]:
        """Return all of them as they were seen last."""
        return list(self._seen.values())

    def joined(self, own: Sequence[BackendView]) -> list[BackendView]:
        """Return these and a core's own, in the order of the configuration: the first is what ``"auto"`` means."""
        last = len(self._order)
        return sorted((*own, *self._seen.values()), key=lambda view: self._order.get(view.name, last))


def view_unseen(backend: Backend, pool: str) -> BackendView:
    """Return how a backend is seen whose core has not been heard of yet."""
    return BackendView(
        backend.name, served_names(backend, None), None, backend.cost, backend.quality, 0, 0, backend.max_concurrency,
        paused=True, model=backend.model, pool=pool,
    )  # fmt: skip
