"""Stages named where no graph is known yet, held against the graphs as they come.

The shared mapping and its variants, ``request_policy`` and ``limits.stages`` serve all graphs, also those still to be
wrapped. So a name that no graph has so far is no fault; but one that is nearly a stage's name is logged, once.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Iterable, Iterator

from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.serving import Serving
from orla_lg.mappers.table import tables_of

log = logging.getLogger("orla_lg")

NEARLY = 0.7
"""How much two names have in common of which one is taken for the other, misspelt (``difflib``'s ratio)."""

MANY_STAGES = 10_000
"""So many are remembered; further ones are only held against what is named when their graph comes."""


class StageNames:
    """The stages of all graphs wrapped so far, and which misspelt names were logged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._told: set[tuple[str, str]] = set()

    def met(self, stages: Iterable[str], serving: Serving) -> None:
        """Note the stages of a graph, and warn of what is named nearly like one of them."""
        names = {name for stage in stages for name in (stage, stage.rpartition(NAMESPACE_SEPARATOR)[2])}
        with self._lock:
            known = self._known | names
            if len(known) <= MANY_STAGES:
                self._known = known
        self._warn(serving, known)

    def look(self, serving: Serving) -> None:
        """Warn of what is named nearly like a stage, after something got a name."""
        self._warn(serving, self._known)

    def _warn(self, serving: Serving, known: set[str]) -> None:
        for where, name in named_by(serving):
            near = [] if name in known else difflib.get_close_matches(name, known, n=1, cutoff=NEARLY)
            if near and self._is_news(where, name):
                log.warning(
                    "%s names stage %r, which no graph wrapped so far has; %r is the nearest: is it meant?",
                    where, name, near[0],
                )  # fmt: skip

    def _is_news(self, where: str, name: str) -> bool:
        with self._lock:
            before = len(self._told)
            self._told.add((where, name))
            return len(self._told) > before


def named_by(serving: Serving) -> Iterator[tuple[str, str]]:
    """Yield every stage that is named for all graphs, after the place where it is."""
    mappings = {"the shared mapping": serving.mappings.shared}
    mappings |= {f"variant {name!r} of the mapping": mapper for name, mapper in serving.mappings.variants.items()}
    for where, mapper in mappings.items():
        yield from ((where, stage) for table in tables_of(mapper) for stage in table.rules)
    for scheduler in serving.schedulers.values():
        yield from (("request_policy", stage) for stage in scheduler.queue.policies.requests)
    yield from (("limits.stages", stage) for stage in serving.limits.shared.stages)
