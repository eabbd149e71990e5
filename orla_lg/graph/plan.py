"""A graph's mapping before anything runs: where each stage would go, and whether that can work."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace

from orla_lg.core.call import Ask
from orla_lg.core.mappers.load import LoadAware
from orla_lg.core.mappers.need import NeedMapper
from orla_lg.core.mappers.table import (
    ExplicitMapper,
    First,
    Rule,
    StageTable,
    faults_of,
    parts_of,
    rule_of,
    tables_of,
)
from orla_lg.core.mapping import Mapper, find, unfit
from orla_lg.core.view import BackendView
from orla_lg.errors import MappingError
from orla_lg.graph.context import Core
from orla_lg.graph.structure import AnyPregel, stages_of, title

log = logging.getLogger("orla_lg")

BY_CODE = "the model named in its code"


@dataclass(frozen=True, slots=True)
class Planned:
    """Where a stage of a graph goes, as far as that shows without a call."""

    stage: str
    backends: tuple[str, ...]
    """In order of preference; empty where each call decides."""
    by: str
    """Who says so; a stage that no mapping names goes by the model named in its code, if it calls one at all."""


def plan(core: Core, graph: AnyPregel, mapper: Mapper | None) -> list[Planned]:
    """Return where each stage of *graph* goes by its own *mapper*, the shared one, or its code."""
    mappers = [each for each in (mapper, core.serving.mapper) if each is not None]
    made = []
    for stage in stages_of(graph):
        said = (planned for each in mappers if (planned := _planned(each, stage)) is not None)
        made.append(next(said, Planned(stage, (), BY_CODE)))
    return made


def _planned(mapper: Mapper, stage: str) -> Planned | None:
    """Return what a mapper will say of a stage; ``None`` where it surely declines."""
    if isinstance(mapper, ExplicitMapper | StageTable):
        if (found := rule_of(mapper.rules, stage)) is None:
            return None
        key, rule = found
        return _planned(rule.mapper, stage) if rule.mapper else Planned(stage, rule.to, f"mapping[{key!r}]")
    if isinstance(mapper, First):
        return _in_turn(stage, [planned for each in mapper.mappers if (planned := _planned(each, stage)) is not None])
    if isinstance(mapper, LoadAware):
        inner = _planned(mapper.inner, stage)
        return inner and replace(inner, by=f"{inner.by}, by load")
    ways = [getattr(mapper, name, None) for name in ("simple", "complex_")]
    return Planned(stage, tuple(filter(None, ways)), f"{type(mapper).__name__}, at each call")


def _in_turn(stage: str, planned: list[Planned]) -> Planned | None:
    """Join what several mappers say that are asked in turn, up to the first that surely answers."""
    sure = next((n for n, each in enumerate(planned) if each.backends), len(planned) - 1)
    asked = planned[: sure + 1]
    if not asked:
        return None
    return Planned(stage, asked[-1].backends, "; else ".join(each.by for each in asked))


def validate(core: Core, graph: AnyPregel, mapper: Mapper | None) -> None:
    """Check a graph's mapping against its stages, the backends and what they serve; report all faults at once.

    Raises:
        MappingError: With one line for each fault.
    """
    views = core.serving.views()
    stages = stages_of(graph)
    faults: list[str] = []
    for part in parts_of(mapper):
        if (check := getattr(part, "check_stages", None)) is not None:
            faults += check(stages)
    faults += faults_of(mapper, [view.name for view in views])
    for stage, rule in _rules(mapper, core.serving.mapper):
        faults += _unserved(core, views, stage, rule)
    _warn_of_misspelt_stages(core, graph, stages)
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in dict.fromkeys(faults))
        raise MappingError(f"{title(graph)} cannot be served as mapped:{listed}")


def _warn_of_misspelt_stages(core: Core, graph: AnyPregel, stages: list[str]) -> None:
    """Warn of names in the shared mapping and its variants that this graph nearly has; they may be another's."""
    for name, _ in _rules(core.serving.mapper, *core.serving.variants.values()):
        if name not in stages and (near := difflib.get_close_matches(name, stages, n=1, cutoff=0.8)):
            log.warning(
                "the shared mapping, or a variant of it, names stage %r; %s has %r: is it meant?",
                name,
                title(graph),
                near[0],
            )


def _rules(*mappers: Mapper | None) -> list[tuple[str, Rule]]:
    return [rule for mapper in mappers for table in tables_of(mapper) for rule in table.rules.items()]


def _unserved(core: Core, views: Sequence[BackendView], stage: str, rule: Rule) -> list[str]:
    """Return a fault for each backend of a rule whose model is not served or cannot do what is set."""
    if isinstance(rule.mapper, NeedMapper):
        return [f"stage {stage!r}: {fault}" for fault in rule.mapper.check_needs(views)]
    asked, faults = Ask(model="auto", messages=()).given(rule.parameters), list[str]()
    for name in rule.to:
        view, desk = find(views, name), core.serving.desks.get(name)
        if view is not None and desk is not None:
            found = unfit(asked, view, desk.backend.model)
            faults += [f"stage {stage!r} on backend {name!r}: {fault}" for fault in found]
    return faults
