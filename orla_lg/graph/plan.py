"""A graph's mapping before anything runs: where each stage would go, and whether that can work."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace

from orla_lg.core.boundary.stage_keys import EMBEDDINGS, parted, with_part
from orla_lg.core.call import Ask
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.mapping import Mapper, Planned, foretold, parts_of
from orla_lg.core.placement.view import BackendView, find, lacks, unserved
from orla_lg.errors import MappingError
from orla_lg.graph.context import Core
from orla_lg.graph.stage_tree import StageTree
from orla_lg.graph.structure import AnyPregel, GraphPlace, places_of, title
from orla_lg.graph.tools.declared import SafeTools
from orla_lg.mappers.stages import KnownStages, doubted
from orla_lg.mappers.table import Rule, faults_of, tables_of

log = logging.getLogger("orla_lg")

BY_CODE = "the model named in its code"


def plan(core: Core, stages: KnownStages, mapper: Mapper | None) -> list[Planned]:
    """Return where each stage of a graph goes by its own *mapper*, the shared one, or its code."""
    beside = ((stage, *_embeddings(core, stage, mapper)) for stage in stages)
    return [_planned(core, stage, mapper) for several in beside for stage in several]


def _embeddings(core: Core, node: str, mapper: Mapper | None) -> list[str]:
    """Return the stage of a node's embeddings, if a mapping names it; ``*:embeddings`` is for any."""
    stage = with_part(node, EMBEDDINGS)
    found = (table.rules.find(stage) for each in (mapper, core.serving.mappings.shared) for table in tables_of(each))
    return [stage] if any(each is not None and parted(each.name)[0] != ANY_STAGE for each in found) else []


def _planned(core: Core, stage: str, mapper: Mapper | None) -> Planned:
    mappers = [each for each in (mapper, core.serving.mappings.shared) if each is not None]
    said = (planned for each in mappers if (planned := foretold(each, stage)) is not None)
    return next(said, Planned(stage, (), BY_CODE))


def tree(
    core: Core | None,
    graph: AnyPregel,
    mapper: Mapper | None,
    layer: LimitScope | None,
    tools: SafeTools | None = None,
) -> StageTree:
    """Return the stages of *graph* as they lie in it, each with what decides it; undecided without a core."""

    def made(place: GraphPlace) -> StageTree:
        inside = tuple(made(each) for each in place.inside)
        if not place.calls or core is None:
            early = place.kind == "tool" and tools is not None and tools.may_begin(place.name, place.key)
            stage = place.key if place.calls else ""
            return StageTree(place.name, place.kind, stage, inside=inside, may_begin_early=early)
        beside = (leaf(core, "embeddings", place.kind, each) for each in _embeddings(core, place.key, mapper))
        return replace(leaf(core, place.name, place.kind, place.key), inside=(*beside, *inside))

    def leaf(core: Core, name: str, kind: str, stage: str) -> StageTree:
        planned, under = _planned(core, stage, mapper), tuple(_under(core, stage, layer))
        return StageTree(name, kind, stage, planned.backends, planned.by, planned.open, under)

    return made(places_of(graph))


def _under(core: Core, stage: str, layer: LimitScope | None) -> Iterator[str]:
    """Yield which limits and which policy hold for a stage, each by the entry that says so."""
    for limits, where in (
        (core.serving.limits.shared, ""),
        *([] if layer is None else [(layer.limits, layer.where)]),
    ):
        if (ruling := limits.of_stage(stage)) is not None:
            yield f"limits.stages[{ruling.name!r}]{where}"
    policies = (scheduler.queue.policies.rules.find(stage) for scheduler in core.serving.schedulers.values())
    for name in dict.fromkeys(found.name for found in policies if found is not None):
        if name != ANY_STAGE:
            yield f"request_policy[{name!r}]"


def validate(core: Core, graph: AnyPregel, mapper: Mapper | None, stages: KnownStages) -> None:
    """Check a graph's mapping against its stages, the backends and what they serve; report all faults at once.

    Raises:
        MappingError: With one line for each fault.
    """
    views = core.serving.views()
    faults: list[str] = []
    for part in parts_of(mapper):
        if (check := getattr(part, "check_stages", None)) is not None:
            faults += check(stages)
    faults += faults_of(mapper, [view.name for view in views])
    for stage, rule in _rules(mapper, core.serving.mappings.shared):
        faults += _unserved(core, views, stage, rule)
    core.stage_names.met(stages, core.serving)
    for note in (note for table in tables_of(mapper) for note in doubted(table.rules, stages)):
        log.warning("%s", note)
    if faults:
        listed = "".join(f"\n  - {fault}" for fault in dict.fromkeys(faults))
        raise MappingError(f"{title(graph)} cannot be served as mapped:{listed}")


def _rules(*mappers: Mapper | None) -> list[tuple[str, Rule]]:
    return [rule for mapper in mappers for table in tables_of(mapper) for rule in table.rules.items()]


def _unserved(core: Core, views: Sequence[BackendView], stage: str, rule: Rule) -> list[str]:
    """Return a fault for each backend of a rule whose model is not served or cannot do what is set."""
    if (check := getattr(rule.mapper, "check_needs", None)) is not None:
        return [f"stage {stage!r}: {fault}" for fault in check(views)]
    asked, faults = Ask(model="auto", messages=()).given(rule.parameters), list[str]()
    for name in rule.to:
        view, scheduler = find(views, name), core.serving.schedulers.get(name)
        if view is not None and scheduler is not None:
            # Which of several models a stage asks for is in its code, and shows at its first call.
            named = unserved(scheduler.backend.model, view.probe) if scheduler.backend.model else []
            found = named + lacks(asked, view.probe)
            faults += [f"stage {stage!r} on backend {name!r}: {fault}" for fault in found]
    return faults
