"""Limits on what a run, a stage or a tenant may use, as users set them; ``book`` enforces them."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from orla_lg.arguments import answering
from orla_lg.core.boundary.checked import dotted, is_number
from orla_lg.core.boundary.complete import complete
from orla_lg.core.boundary.stage_rules import Ruling, StageRules
from orla_lg.core.identity import ANY_STAGE
from orla_lg.errors import ConfigError, did_you_mean, shown


@dataclass(frozen=True, slots=True)
class LimitFigure:
    """Something that can be limited."""

    said: str
    """How a message says an amount of it."""
    whole: bool = False
    """There are only whole numbers of it."""
    digits: int = 0
    """Sums are rounded to so many decimals, far below what is ever counted."""

    def format(self, amount: float) -> str:
        """Return an amount as a message says it."""
        return self.said.format(amount)


USD_DIGITS, SECOND_DIGITS = 12, 6

FIGURES: Mapping[str, LimitFigure] = {
    "calls": LimitFigure("{} calls", whole=True),
    "tokens": LimitFigure("{} tokens", whole=True),
    "cost_usd": LimitFigure("${:.6g}", digits=USD_DIGITS),
    "wall_s": LimitFigure("{:.6g} s", digits=SECOND_DIGITS),
}
"""What can be limited, in the order in which amounts are kept and stored. ``Limit`` and ``Amount`` have a field for
each, checked when they are imported; all other code goes over this table."""


@answering
@dataclass(frozen=True, slots=True)
class Limit:
    """What the calls of a run, a stage or a tenant may use together; ``None`` does not limit.

    Raises:
        ConfigError: A value is not allowed.
    """

    calls: int | None = None
    """Calls, each counted once however often it had to be tried; one that no engine answered does not count."""
    tokens: int | None = None
    """Prompt (what was cached too) and answer."""
    cost_usd: float | None = None
    """US dollars by the backends' prices; 0 leaves the backends that cost nothing."""
    wall_s: float | None = None
    """Seconds: of a run, since it began; of a stage or tenant, that engines worked on its calls, added up."""
    per_s: float | None = None
    """In any so many seconds; ``None``: since the ``Orla`` or the run began. A call that finds the window full is
    refused, and does not wait for it."""

    def __post_init__(self) -> None:
        for name in FIGURES:
            whole = FIGURES[name].whole
            if not _is_number(getattr(self, name), whole=whole):
                kind = "whole number" if whole else "number"
                raise ConfigError(f"{name} must be a {kind} of at least 0, got {shown(getattr(self, name))}")
        if not _is_number(self.per_s, whole=False) or self.per_s == 0:
            raise ConfigError(f"per_s must be a number of seconds above 0, got {shown(self.per_s)}")
        if self.per_s is not None and all(getattr(self, name) is None for name in FIGURES):
            raise ConfigError(f"per_s limits nothing by itself; give one of {', '.join(FIGURES)} with it")


complete(FIGURES, {each.name: each for each in fields(Limit) if each.name != "per_s"}, "Limit, by its fields,")


def _is_number(value: object, *, whole: bool) -> bool:
    if value is None:
        return True
    kinds = int if whole else int | float
    return isinstance(value, kinds) and is_number(value) and value >= 0


@answering
@dataclass(frozen=True, slots=True)
class Limits:
    """Limits by what they hold for.

    Raises:
        ConfigError: A value is no ``Limit``, or its window has no meaning.
    """

    run: Limit | None = None
    """Of each run by itself."""
    stages: Mapping[str, Limit] = field(default_factory=dict)
    """By stage, found like the entries of a mapping: a node's holds for all that runs inside it together, except what
    a nearer one is for; ``"*"``: each of the others by itself."""
    tenants: Mapping[str, Limit] = field(default_factory=dict)
    """By the calls' ``tenant`` hint; ``"*"``: each of the others by itself. Calls without one have no such limit."""
    _rules: StageRules[Limit] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for kind in _TABLES:
            if not isinstance(getattr(self, kind), Mapping):
                raise ConfigError(f"limits.{kind}: expected limits by name, got {shown(getattr(self, kind))}")
        named = [((kind, name), each) for kind in _TABLES for name, each in getattr(self, kind).items()]
        for keys, limit in [*named, *([] if self.run is None else [(("run",), self.run)])]:
            if not isinstance(limit, Limit):
                raise ConfigError(f"{dotted('limits', *keys)}: expected a Limit, got {shown(limit)}")
        if self.run is not None and None not in (self.run.wall_s, self.run.per_s):
            raise ConfigError("limits.run: wall_s counts from the run's beginning, so per_s cannot go with it")
        object.__setattr__(self, "_rules", StageRules(self.stages))

    @classmethod
    def of(cls, given: Limits | Mapping[str, Any]) -> Limits:
        """Return the limits in a table: ``run``, ``stages.NAME`` and ``tenants.NAME``.

        Raises:
            ConfigError: Naming the key, what was found and what is allowed.
        """
        if isinstance(given, Limits):
            return given
        table = _table("limits", given, [each.name for each in fields(cls) if each.init])
        run = table.get("run")
        named = {kind: _table(f"limits.{kind}", table.get(kind, {}), None) for kind in _TABLES}
        return cls(
            None if run is None else _limit("limits.run", run),
            **{
                kind: {name: _limit(dotted("limits", kind, name), each) for name, each in entries.items()}
                for kind, entries in named.items()
            },
        )

    def of_stage(self, stage: str) -> Ruling[Limit] | None:
        """Return what limits a stage: the limit, and the node whose calls count together under it."""
        return self._rules.find(stage)

    def of_tenant(self, tenant: str | None) -> Limit | None:
        """Return a tenant's limit."""
        return None if not tenant else self.tenants.get(tenant, self.tenants.get(ANY_STAGE))


_TABLES = ("stages", "tenants")
NO_LIMITS = Limits()


def checked(limits: object) -> Limits:
    """Return *limits* if they are some, and ``NO_LIMITS`` itself where they limit nothing.

    Raises:
        ConfigError: It is something else.
    """
    if isinstance(limits, Limit):
        raise ConfigError(
            f"limits: a Limit is given, not what it is for; Limits(run={shown(limits)}) is for each run"
        )
    if not isinstance(limits, Limits):
        raise ConfigError(f"limits: expected Limits, got {shown(limits)}; Limits.of(...) reads a dict")
    return NO_LIMITS if limits == NO_LIMITS else limits


def _table(where: str, given: object, known: Sequence[str] | None) -> Mapping[str, Any]:
    if not isinstance(given, Mapping):
        raise ConfigError(f"{where}: expected a table, got {shown(given)}")
    for key in given:
        if known is not None and key not in known:
            raise ConfigError(f"{dotted(where, key)}: unknown key{did_you_mean(key, known)}")
    return given


def _limit(where: str, given: object) -> Limit:
    if isinstance(given, Limit):
        return given
    table = _table(where, given, [each.name for each in fields(Limit)])
    try:
        return Limit(**table)
    except ConfigError as error:
        raise ConfigError(f"{where}.{error}") from error


SHARED = "shared"
"""The key of the layer that holds for all calls."""

CONFIGURABLE = "configurable"
"""The key of the layer that came with a run's configuration."""


@dataclass(frozen=True, eq=False, slots=True)
class LimitScope:
    """Limits with the place where they were given."""

    limits: Limits
    key: Hashable
    """Accounts of layers with the same key are the same."""
    where: str = ""
    """For messages: ``" of graph 'support'"``."""
    of_run: bool = False
    """The accounts are one run's own, and go with it."""
    whole: Limit | None = None
    """What all calls of the layer may use together."""
    name: str = ""
    """What *whole* is of."""
