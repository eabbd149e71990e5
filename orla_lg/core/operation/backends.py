"""The backends of one core, which may come and go while calls run."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Sequence, ValuesView

from orla_lg.core.call import Call
from orla_lg.core.placement.elsewhere import ElsewhereBackends
from orla_lg.core.placement.view import BackendView, view_of
from orla_lg.core.scheduler import BackendScheduler


class Schedulers(dict[str, BackendScheduler]):
    """The schedulers by name, in the order of the configuration.

    What iterates sees the state at which it began, whatever another thread adds meanwhile. A backend that was taken
    out is no longer seen; by its name it is still found, for the calls that wait or run there, until they are gone.

    A backend of another pool is none of these: to look it up raises ``BackendElsewhere``.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen = dict[str, BackendScheduler]()
        """A copy, replaced at each change."""
        self._retired = dict[str, BackendScheduler]()
        self.elsewhere: ElsewhereBackends | None = None
        """Those of other pools; ``None``: there are no pools."""

    def __setitem__(self, name: str, scheduler: BackendScheduler) -> None:
        super().__setitem__(name, scheduler)
        self._seen = {**self._seen, name: scheduler}

    def __delitem__(self, name: str) -> None:
        super().__delitem__(name)
        self._seen = {each: other for each, other in self._seen.items() if each != name}

    def retire(self, name: str) -> BackendScheduler:
        """Let no new call be placed on a backend; those that are there go on."""
        scheduler = self._retired[name] = self[name]
        del self[name]
        return scheduler

    def forget(self, name: str) -> None:
        """Forget a backend that was taken out; nothing is there any more."""
        self._retired.pop(name, None)

    def views(self, call: Call | None = None) -> list[BackendView]:
        """Return the backends as mappers see them, on behalf of a call, those of other pools among them."""
        own = [view_of(scheduler, call) for scheduler in self._seen.values()]
        return own if self.elsewhere is None else self.elsewhere.joined(own)

    def arrange(self, order: Sequence[str]) -> None:
        """Let them stand in the order of these names; those without one stand behind."""
        places = {name: number for number, name in enumerate(order)}
        in_order = sorted(self._seen, key=lambda name: places.get(name, len(places)))
        self._seen = {name: self._seen[name] for name in in_order}

    def __missing__(self, name: str) -> BackendScheduler:
        if self.elsewhere is not None and name in self.elsewhere:
            raise self.elsewhere.error(name)
        return self._retired[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._seen)

    def keys(self) -> KeysView[str]:  # type: ignore[override]  # views of the copy
        """Return the names."""
        return self._seen.keys()

    def values(self) -> ValuesView[BackendScheduler]:  # type: ignore[override]  # views of the copy
        """Return the schedulers."""
        return self._seen.values()

    def items(self) -> ItemsView[str, BackendScheduler]:  # type: ignore[override]
        """Return names and schedulers."""
        return self._seen.items()
