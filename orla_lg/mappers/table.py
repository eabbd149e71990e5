"""The developer's own table: stage → backend, by name, by need, or by another mapper, with its parameters.

A stage is found by its own name, else by that of the nearest node around it, else under ``"*"`` (``StageRules``).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, TypeVar, cast

from orla_lg.arguments import answering
from orla_lg.core.boundary.checked import is_number
from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.call import Assignment, Call
from orla_lg.core.mapping import BY_NAME, Consultation, Mapper, Planned, foretold, parts_of
from orla_lg.core.placement.view import BackendView
from orla_lg.core.steps import Steps
from orla_lg.errors import ConfigError, did_you_mean, shown
from orla_lg.mappers.need import NEED_KEYS, NeedMapper
from orla_lg.mappers.stages import check_stages

T = TypeVar("T")

PARAMETERS = frozenset(
    {
        "extra_body", "frequency_penalty", "logit_bias", "max_completion_tokens", "max_tokens", "presence_penalty",
        "reasoning_effort", "response_format", "seed", "stop", "temperature", "top_p", "verbosity",
    }
)  # fmt: skip
"""Fields of a chat completion that a mapping may set for a stage."""

_LIMITS: Mapping[str, tuple[float, float]] = {
    "frequency_penalty": (-2, 2), "max_completion_tokens": (1, inf), "max_tokens": (1, inf),
    "presence_penalty": (-2, 2), "temperature": (0, 2), "top_p": (0, 1),
}  # fmt: skip
"""For parameters that are numbers, from and to."""

_KINDS: Mapping[str, tuple[str, Any]] = {
    "extra_body": ("a table", Mapping), "logit_bias": ("a table", Mapping | None),
    "max_completion_tokens": ("a whole number", int), "max_tokens": ("a whole number", int),
    "reasoning_effort": ("text", str | None), "response_format": ("a table", Mapping | None),
    "seed": ("a whole number", int | None), "stop": ("text or a list of texts", str | list | tuple | None),
    "verbosity": ("text", str | None),
}  # fmt: skip
"""What parameters are, beside numbers."""

Entry = str | Sequence[str] | Mapping[str, Any] | Mapper
"""A backend's name, names in order of preference, a table (``to`` or ``needs``, and parameters), or a mapper."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What the table says of one stage."""

    to: tuple[str, ...] = ()
    mapper: Mapper | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)


class _Table:
    """What both tables share: their rules, what they will say of a stage, and what is wrong with them."""

    def __init__(self, table: Mapping[str, Entry]) -> None:
        self.rules = _rules(table)

    def foretell(self, stage: str) -> Planned | None:
        """Return what it will say of a stage, or what the mapper does that decides about it."""
        return _foretold(self.rules, stage)

    def check_backends(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every name in the table that is no backend."""
        return check_backends(self.rules, known)

    def check_stages(self, known: Iterable[str]) -> list[str]:
        """Return a fault for every stage in the table that is in no graph."""
        return check_stages(self.rules, known)


@answering
class ExplicitMapper(_Table):
    """A table whose every entry names its backends.

    Raises:
        ConfigError: An entry is none, or names an unknown backend.
    """

    def __init__(self, table: Mapping[str, Entry]) -> None:
        super().__init__(table)
        if asking := [stage for stage, rule in self.rules.items() if rule.mapper is not None]:
            raise ConfigError(
                f"mapping of stage {shown(asking[0])}: an ExplicitMapper takes names only; use StageTable"
            )

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        found = self.rules.find(call.identity.stage)
        return None if found is None else named(found.name, found.entry)


@answering
class StageTable(_Table):
    """A table whose entries may be mappers too: each stage is decided in its own way."""

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        if (found := self.rules.find(call.identity.stage)) is None:
            return None
        rule = found.entry
        if rule.mapper is None:
            return named(found.name, rule)
        chosen: Assignment | None = yield from ask.mapper(rule.mapper, call, backends)
        if chosen is None or not rule.parameters:
            return chosen
        return replace(chosen, parameters={**rule.parameters, **chosen.parameters})


@answering
class First:
    """Asks several mappers in order; the first answer counts."""

    def __init__(self, *mappers: Mapper | Mapping[str, Entry]) -> None:
        self.mappers = tuple(part_of(mapper) for mapper in mappers)

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        for mapper in self.mappers:
            chosen = yield from ask.mapper(mapper, call, backends)
            if chosen is not None:
                return chosen
        return None

    def foretell(self, stage: str) -> Planned | None:
        """Return what its mappers will say of a stage, up to the first that surely answers."""
        foreseen = [each for mapper in self.mappers if (each := foretold(mapper, stage)) is not None]
        sure = next((n for n, each in enumerate(foreseen) if each.backends), len(foreseen) - 1)
        asked = foreseen[: sure + 1]
        if not asked:
            return None
        may_be_any = any(each.open or not each.backends for each in asked)
        return Planned(stage, asked[-1].backends, "; else ".join(each.by for each in asked), open=may_be_any)


def stage_mapper(chosen: Mapper | Mapping[str, Entry] | None) -> Mapper | None:
    """Return the mapper for a dict, or the object itself.

    Raises:
        ConfigError: The object is neither a dict nor a mapper.
    """
    if chosen is None:
        return None
    if isinstance(chosen, Mapping):
        table = StageTable(chosen)
        return ExplicitMapper(chosen) if all(rule.mapper is None for rule in table.rules.values()) else table
    if not is_mapper(chosen):
        hint = f"; an instance is meant: {chosen.__name__}(...)" if isinstance(chosen, type) else ""
        if isinstance(chosen, str):
            hint = f"; one backend for all stages is {{'*': {shown(chosen)}}}"
        raise ConfigError(
            f"{shown(chosen)} is no stage mapper: give a dict or an object with map(call, backends){hint}"
        )
    return chosen


def part_of(chosen: Mapper | Mapping[str, Entry]) -> Mapper:
    """Return the mapper for what a mapper was given to hold: a dict, or a mapper.

    Raises:
        ConfigError: It is neither.
    """
    made = stage_mapper(chosen)
    if made is None:
        raise ConfigError("a mapper that holds others was given None")
    return made


def tables_of(mapper: Mapper | None) -> list[_Table]:
    """Return the tables in a mapper, itself included: what can be checked before anything runs."""
    return [each for each in parts_of(mapper) if isinstance(each, _Table)]


def faults_of(mapper: Mapper | None, known: Iterable[str]) -> list[str]:
    """Return a fault for every name in a mapper's parts that is no backend, where a part can tell."""
    names = set(known)
    checks = [check for part in parts_of(mapper) if (check := getattr(part, "check_backends", None)) is not None]
    return [fault for check in checks for fault in check(names)]


def is_mapper(thing: object) -> bool:
    """Whether *thing* is a mapper of any kind."""
    methods = (getattr(thing, method, None) for method in ("map", "amap", "consult"))
    return not isinstance(thing, type) and any(map(callable, methods))


def named(key: str, rule: Rule) -> Assignment:
    """Return what a rule with names says."""
    return Assignment(rule.to[0], None, BY_NAME, f"mapping[{key!r}]", rule.to[1:], rule.parameters)


def _foretold(rules: StageRules[Rule], stage: str) -> Planned | None:
    if (found := rules.find(stage)) is None:
        return None
    rule, by = found.entry, f"mapping[{found.name!r}]"
    if rule.mapper is None:
        return Planned(stage, rule.to, by)
    said = foretold(rule.mapper, stage)
    return None if said is None else replace(said, by=f"{by}: {said.by}")


def _rules(table: object) -> StageRules[Rule]:
    if not isinstance(table, Mapping):
        raise ConfigError(f"a mapping must be a table of entries by stage, got {shown(table)}")
    return StageRules({stage: _rule(stage, entry) for stage, entry in table.items()})


def _rule(stage: str, entry: Entry) -> Rule:
    where = f"mapping of stage {shown(stage)}"
    if not isinstance(stage, str):
        raise ConfigError(f"{where}: a stage is named by text")
    if isinstance(entry, Mapping):
        return _rule_of_table(where, entry)
    if is_mapper(entry):
        return Rule(mapper=cast("Mapper", entry))
    return Rule(_names(where, entry))


def _rule_of_table(where: str, entry: Mapping[str, Any]) -> Rule:
    given = dict(entry)
    to, needs = given.pop("to", None), {key: given.pop(key) for key in NEED_KEYS if key in given}
    if unknown := set(given) - PARAMETERS:
        name = min(unknown, key=str)
        near = did_you_mean(name, {"to", *NEED_KEYS, *PARAMETERS})
        raise ConfigError(f"{where}: unknown key {shown(name)}{near}; what only an engine knows goes into extra_body")
    for name, value in given.items():
        _check_parameter(where, name, value)
    if (to is None) == (not needs):
        got = shown(sorted(map(str, entry)))
        raise ConfigError(f"{where}: give either 'to' (backends) or 'needs' and 'prefer', got {got}")
    if to is not None:
        return Rule(_names(where, to), parameters=given)
    return Rule(mapper=NeedMapper.of(where, needs), parameters=given)


def _check_parameter(where: str, name: str, value: object) -> None:
    """Refuse what no engine could take: a number out of its range, another type, what JSON cannot hold."""
    if name in _LIMITS:
        least, most = _LIMITS[name]
        if not (is_number(value) and least <= cast("float", value) <= most):
            allowed = f"a number from {least:g} to {most:g}" if most < inf else f"a number, {least:g} or more"
            raise ConfigError(f"{where}: {name} must be {allowed}, got {shown(value)}")
    expected, kinds = _KINDS.get(name, ("a number", object))
    if not isinstance(value, kinds) or isinstance(value, bool):
        raise ConfigError(f"{where}: {name} must be {expected}, got {shown(value)}")
    try:
        json.dumps(value, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: {name} must be what JSON can hold, got {shown(value)} ({error})") from error


def _names(where: str, to: object) -> tuple[str, ...]:
    names = (to,) if isinstance(to, str) else tuple(to) if isinstance(to, list | tuple) else ()
    if not names or not all(isinstance(name, str) for name in names):
        raise ConfigError(f"{where}: expected a backend's name or a list of names, got {shown(to)}")
    return names


def unknown_backends(where: str, given: Iterable[str], known: Iterable[str]) -> list[str]:
    """Return a fault for every name in *given* that is no backend; *where* says what names it."""
    choices = set(known)
    return [
        f"{where} names backend {shown(name)}, which does not exist{did_you_mean(name, choices)}"
        for name in dict.fromkeys(given)
        if name not in choices
    ]


def check_backends(rules: Mapping[str, Rule], known: Iterable[str]) -> list[str]:
    """Return a fault for every name in *rules* that is no backend."""
    choices = set(known)
    return [
        f"stage {shown(stage)} is mapped to backend {shown(name)}, which does not exist{did_you_mean(name, choices)}"
        for stage, rule in rules.items()
        for name in rule.to
        if name not in choices
    ]
