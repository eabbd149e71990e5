"""Step 2, map: which backend and model a stage runs on, and whether that can work.

Who chooses, first answer wins: the mapping of the graph, the shared mapping, the model named in the code
(a backend's name or a model it serves), and for ``auto`` the first backend. What nobody places is not
ours: an intercepted call passes through, a ``ChatOrla`` call is a ``MappingError``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from orla_lg.core.backend import BackendView, Capability, names
from orla_lg.core.call import Ask, Assignment, Call
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.errors import ConfigError, MappingError, did_you_mean

ANY_STAGE = "*"
AUTO = "auto"

CHARS_PER_TOKEN_AT_MOST = 12
"""No tokenizer in use packs natural text or code more densely; a prompt refused by it is surely too long."""


class StageMapper(Protocol):
    """Chooses a backend for a call, or declines."""

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        """Return where *call* runs, or ``None`` to let the next mapper answer."""
        ...


class ExplicitMapper:
    """The developer's own table: stage → backend, or → backends in order of preference.

    A stage is found by its full key (``subgraph|node``), else by its node's name, else under ``"*"``.
    """

    def __init__(self, table: Mapping[str, str | Sequence[str]]) -> None:
        self.table = {stage: (to,) if isinstance(to, str) else tuple(to) for stage, to in table.items()}
        for stage, to in self.table.items():
            if not to or not all(isinstance(name, str) for name in to):
                raise ConfigError(f"mapping of stage {stage!r}: expected a backend's name or a list of names")

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        stage = call.identity.stage
        if not stage:  # outside a graph there is no stage to map; the code's model decides
            return None
        node = stage.rpartition(NAMESPACE_SEPARATOR)[2]
        for key in (stage, node, ANY_STAGE):
            if to := self.table.get(key):
                return Assignment(to[0], mapper="explicit", reason=f"mapping[{key!r}]", alternatives=to[1:])
        return None

    def check_backends(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every name in the table that is no backend."""
        choices = set(known)
        return [
            f"stage {stage!r} is mapped to backend {name!r}, which does not exist{did_you_mean(name, choices)}"
            for stage, to in self.table.items()
            for name in to
            if name not in choices
        ]

    def check_stages(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every stage in the table that is in no graph."""
        stages = set(known)
        nodes = stages | {stage.rpartition(NAMESPACE_SEPARATOR)[2] for stage in stages}
        return [
            f"the mapping names stage {stage!r}, which the graph does not have{did_you_mean(stage, nodes)}"
            for stage in self.table
            if stage != ANY_STAGE and stage not in nodes
        ]


def stage_mapper(chosen: StageMapper | Mapping[str, str | Sequence[str]] | None) -> StageMapper | None:
    """Return the mapper for a dict, or the object itself.

    Raises:
        ConfigError: The object is neither a dict nor has ``map``.
    """
    if chosen is None or not isinstance(chosen, Mapping):
        if chosen is not None and not callable(getattr(chosen, "map", None)):
            raise ConfigError(f"{chosen!r} is no stage mapper: give a dict or an object with map(call, backends)")
        return chosen
    return ExplicitMapper(chosen)


def assign(call: Call, backends: Sequence[BackendView]) -> Assignment | None:
    """Return where *call* runs; ``None`` when nobody places it and it may pass.

    Raises:
        MappingError: The backend does not exist or cannot do what the call asks, or nobody places a call
            that may not pass.
    """
    chosen = _first_answer(call, backends)
    if chosen is None:
        if call.may_pass:
            return None
        known = {name for backend in backends for name in backend.models}
        where = f"stage {call.identity.stage!r}" if call.identity.stage else "a call outside any graph"
        raise MappingError(
            f"{where}: model {call.ask.model!r} is neither a backend nor served by one, "
            f"and no mapping names the stage{did_you_mean(call.ask.model, known)}"
        )
    view = find(backends, chosen.backend)
    if view is None:
        raise MappingError(
            f"stage {call.identity.stage!r}: mapper {chosen.mapper!r} chose backend {chosen.backend!r}, "
            f"which does not exist{did_you_mean(chosen.backend, names(backends))}"
        )
    if faults := unfit(call.ask, view, chosen.model):
        able = [b.name for b in backends if not unfit(call.ask, b, None)]
        raise MappingError(
            f"stage {call.identity.stage!r} on backend {view.name!r}: {'; '.join(faults)}. "
            f"Backends that can: {', '.join(able) or 'none'}"
        )
    return _with_able_alternatives(call, backends, chosen) if chosen.alternatives else chosen


def _with_able_alternatives(call: Call, backends: Sequence[BackendView], chosen: Assignment) -> Assignment:
    able = []
    for name in dict.fromkeys(chosen.alternatives):
        if (view := find(backends, name)) is None:
            raise MappingError(
                f"stage {call.identity.stage!r}: mapper {chosen.mapper!r} names alternative {name!r}, "
                f"which does not exist{did_you_mean(name, names(backends))}"
            )
        if not unfit(call.ask, view, chosen.model):
            able.append(name)
    return replace(chosen, alternatives=tuple(able))


def _first_answer(call: Call, backends: Sequence[BackendView]) -> Assignment | None:
    for mapper in call.mappers:
        if chosen := mapper.map(call, backends):
            return chosen
    return named_in_code(call.ask.model, backends)


def named_in_code(model: str, backends: Sequence[BackendView]) -> Assignment | None:
    """Return the backend that the code's model name means: by backend name first, then by model."""
    if model == AUTO and backends:
        return Assignment(backends[0].name, mapper="code", reason="'auto' takes the first backend")
    for backend in backends:
        if model == backend.name:
            return Assignment(backend.name, mapper="code", reason=f"the code names backend {model!r}")
    serving = [backend for backend in backends if model in backend.models]
    if not serving:
        return None
    # An engine that lists the name is asked for it; otherwise the name is ours, for the backend's own model.
    listed = _lists(serving[0], model)
    others = tuple(backend.name for backend in serving[1:] if _lists(backend, model) == listed)
    reason = f"the code names model {model!r}"
    return Assignment(serving[0].name, model if listed else None, "code", reason, others)


def _lists(backend: BackendView, model: str) -> bool:
    return backend.probe is not None and model in backend.probe.models


def find(backends: Sequence[BackendView], name: str) -> BackendView | None:
    """Return the backend called *name*."""
    return next((backend for backend in backends if backend.name == name), None)


def unfit(ask: Ask, backend: BackendView, model: str | None) -> list[str]:
    """Return why *backend* cannot do what is asked; empty where it can, or has not said what it can."""
    probe = backend.probe
    if probe is None:
        return []
    faults = []
    if model is not None and probe.models and model not in probe.models:
        faults.append(f"model {model!r} is not served there{did_you_mean(model, probe.models)}")
    if ask.json_schema and not probe.can(Capability.JSON_SCHEMA):
        faults.append("the engine cannot follow a JSON schema")
    if ask.tools and not probe.can(Capability.TOOLS):
        faults.append("the engine cannot call tools")
    if probe.context_tokens is not None:
        at_least = ask.prompt_chars // CHARS_PER_TOKEN_AT_MOST
        if at_least > probe.context_tokens:
            faults.append(
                f"the prompt has at least {at_least} tokens ({ask.prompt_chars} characters), "
                f"its context holds {probe.context_tokens}"
            )
    return faults
