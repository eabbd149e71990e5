"""Stages named where no graph is known yet, held against the graphs as they come.

The shared mapping and its variants, ``request_policy``, ``limits.stages`` and ``stages`` serve all graphs, also those
still to be wrapped. So a name that no graph has so far is no fault; but one that is nearly a stage's is logged, once.
"""

from __future__ import annotations

import difflib
import logging
import threading
from collections.abc import Iterator, Mapping

from orla_lg.core.boundary.stage_keys import parted
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.serving import Serving
from orla_lg.mappers.stages import NEARLY, KnownStages, check_stages
from orla_lg.mappers.table import tables_of

log = logging.getLogger("orla_lg")

MANY_STAGES = 10_000
"""So many are remembered; further ones are only held against what is named when their graph comes."""


class StageNames:
    """The stages of all graphs wrapped so far, and which misspelt names were logged."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: set[str] = set()
        self._told: set[tuple[str, str]] = set()

    def met(self, stages: KnownStages, serving: Serving) -> None:
        """Note the stages of a graph, and warn of what is named nearly like one of them."""
        with self._lock:
            known = self._known | stages.names
            if len(known) <= MANY_STAGES:
                self._known = known
        self._warn(serving, known)

    def look(self, serving: Serving) -> None:
        """Warn of what is named nearly like a stage, after something got a name."""
        self._warn(serving, self._known)

    def _warn(self, serving: Serving, known: set[str]) -> None:
        for where, name in named_by(serving):
            node, part = parted(name)
            near = [] if node in known else [each + part for each in _near(node, known)]
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


def _near(name: str, known: set[str]) -> list[str]:
    """Return the known name most like *name* that lies as deep; none is meant by what a node holds unseen."""
    as_deep = [each for each in known if each.count(NAMESPACE_SEPARATOR) == name.count(NAMESPACE_SEPARATOR)]
    return difflib.get_close_matches(name, as_deep, n=1, cutoff=NEARLY)


def named_by(serving: Serving) -> Iterator[tuple[str, str]]:
    """Yield every stage that is named for all graphs, after the place where it is."""
    for where, table in _tables(serving):
        yield from ((where, stage) for stage in table)


def undecided(serving: Serving, stages: KnownStages, *, of: str = "the graph") -> list[str]:
    """Return a note for every stage named for all graphs that decides nothing in the graph of *stages*."""
    return [note for where, table in _tables(serving) for note in check_stages(table, stages, said_by=where, of=of)]


def _tables(serving: Serving) -> Iterator[tuple[str, Mapping[str, object]]]:
    mappings = {"the shared mapping": serving.mappings.shared}
    mappings |= {f"variant {name!r} of the mapping": mapper for name, mapper in serving.mappings.variants.items()}
    for where, mapper in mappings.items():
        yield from ((where, table.rules) for table in tables_of(mapper))
    policies = (scheduler.queue.policies.requests for scheduler in serving.schedulers.values())
    yield "request_policy", {stage: each for requests in policies for stage, each in requests.items()}
    yield "limits.stages", serving.limits.shared.stages
    yield "stages", serving.guard.stages_of("file")
