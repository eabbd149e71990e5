"""Access policies and their evaluation, in the order of Orla's v1: deny, allow, envelope, else allowed.

1. A policy that denies, and matches subject and resource, denies.
2. Else one that allows and matches both allows.
3. Else, if the subject has some policy for this *type* of resource, that one is its envelope: what it does not name
   is denied.
4. Else nothing was said of the subject: allowed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from orla_lg.arguments import answering
from orla_lg.core.boundary.checked import choice, text, texts
from orla_lg.core.guard.globs import Glob, read_glob
from orla_lg.errors import ConfigError, shown

Action = Literal["allow", "deny"]

KINDS = ("backend", "tool", "data", "skill")
"""Of resources; one of them stands before the colon."""

NO_TAGS = frozenset({"*"})
"""The subject of a call that has no tag at all."""

ANY_LABEL = "*"
"""Stands for every label there may be: of a workflow of which it is no longer known which it has."""

KEEP_VERDICTS = 4096
"""Tags are what callers say, so there is no end to the subjects that may be asked about."""


class Verdict(NamedTuple):
    """Whether something is allowed, and why."""

    allowed: bool
    rule: str = ""
    """The name of the policy that decided; empty where none had to."""
    reason: str = ""


ALLOWED = Verdict(True)


@answering
@dataclass(frozen=True)
class AccessPolicy:
    """Allows or denies subjects some resources.

    Raises:
        ConfigError: A part of it is not allowed, or a pattern is malformed.
    """

    name: str
    subjects: Sequence[str]
    """Patterns over ``key:value`` of tags, ``backend:NAME`` for rules about labels, and ``*``, which no tags at all
    are."""
    resources: Sequence[str]
    """Patterns over ``backend:NAME``, ``tool:NAME``, ``data:LABEL`` and ``skill:NAME``."""
    action: Action = "allow"

    def __post_init__(self) -> None:
        text("access policy: name", self.name)
        where = f"access policy {shown(self.name)}"
        for part in ("subjects", "resources"):
            patterns = texts(f"{where}: {part}", getattr(self, part))
            if not patterns:
                raise ConfigError(f"{where}: {part} must name at least one pattern")
            object.__setattr__(self, part, patterns)
        choice(f"{where}: action", self.action, ("allow", "deny"))
        for pattern in self.resources:
            kind, colon, _ = pattern.partition(":")
            if not colon or kind not in KINDS:
                begins = ", ".join(f"{each}:" for each in KINDS)
                raise ConfigError(f"{where}: resource {shown(pattern)} must begin with one of {begins}")
        for pattern in (*self.subjects, *self.resources):
            try:
                read_glob(pattern)
            except ConfigError as error:
                raise ConfigError(f"{where}: {error}") from None


class _Rule(NamedTuple):
    """A policy, as far as it speaks of one type of resource."""

    place: int
    """Among all policies: of several that decide, the first one is named."""
    name: str
    denies: bool
    resources: tuple[Glob, ...]


@dataclass(frozen=True, eq=False)
class _OneType:
    """The policies for one type of resource, by subject."""

    plain: dict[str, list[_Rule]] = field(default_factory=dict)
    """Those whose subject is one text, by it."""
    globs: list[tuple[Glob, _Rule]] = field(default_factory=list)

    def of(self, subjects: Iterable[str]) -> list[_Rule]:
        """Return the policies that match one of *subjects*, in the order of all policies."""
        found: dict[int, _Rule] = {}
        for subject in subjects:
            for rule in self.plain.get(subject, ()):
                found[rule.place] = rule
            for glob, rule in self.globs:
                if rule.place not in found and glob.matches(subject):
                    found[rule.place] = rule
        return [found[place] for place in sorted(found)]


class PolicyEvaluator:
    """Evaluates a list of policies, indexed by type of resource and by subject. Verdicts are remembered, bounded.

    Any thread may ask: what is remembered is a dictionary of values that never change.
    """

    def __init__(self, policies: Iterable[AccessPolicy]) -> None:
        self.policies = tuple(policies)
        self._types: dict[str, _OneType] = {}
        for place, policy in enumerate(self.policies):
            resources = [read_glob(pattern) for pattern in policy.resources]
            for kind in KINDS:
                mine = tuple(glob for glob in resources if glob.pattern.partition(":")[0] == kind)
                if mine:
                    self._add(kind, _Rule(place, policy.name, policy.action == "deny", mine), policy.subjects)
        self._known: dict[tuple[frozenset[str], str], Verdict] = {}

    def _add(self, kind: str, rule: _Rule, subjects: Iterable[str]) -> None:
        rules = self._types.setdefault(kind, _OneType())
        for pattern in subjects:
            glob = read_glob(pattern)
            if glob.literal is None:
                rules.globs.append((glob, rule))
            else:
                rules.plain.setdefault(glob.literal, []).append(rule)

    def speaks_of(self, kind: str) -> bool:
        """Whether any policy names resources of that type."""
        return kind in self._types

    def verdict(self, subjects: frozenset[str], kind: str, name: str) -> Verdict:
        """Return whether any of *subjects*, which are one caller's, may use a resource.

        Args:
            subjects: ``key:value`` each, ``NO_TAGS``, or ``backend:NAME`` alone.
            kind: Of the resource: ``backend``, ``tool``, ``data`` or ``skill``.
            name: Of the resource.
        """
        rules = self._types.get(kind)
        if rules is None:
            return ALLOWED
        resource = f"{kind}:{name}"
        known = self._known.get((subjects, resource))
        if known is None:
            if len(self._known) >= KEEP_VERDICTS:
                self._known = {}
            known = self._known[subjects, resource] = _decided(rules.of(subjects), resource, kind, subjects)
        return known


def _decided(rules: Sequence[_Rule], resource: str, kind: str, subjects: frozenset[str]) -> Verdict:
    said = [rule for rule in rules if _speaks_of(rule, resource)]
    subject = ", ".join(sorted(subjects)) if subjects != NO_TAGS else "a call without tags"
    for rule in said:
        if rule.denies:
            return Verdict(False, rule.name, f"policy {shown(rule.name)} denies {subject} {resource}")
    for rule in said:
        return Verdict(True, rule.name, f"policy {shown(rule.name)} allows {subject} {resource}")
    for rule in rules:
        envelope = f"policy {shown(rule.name)} says which {kind}s {subject} may use"
        return Verdict(False, rule.name, f"{envelope}, and no policy allows {resource}")
    return ALLOWED


def _speaks_of(rule: _Rule, resource: str) -> bool:
    """Whether a policy names a resource. Of any label speaks what denies one of them, and what allows all."""
    if resource == f"data:{ANY_LABEL}":
        return rule.denies or any(glob.pattern == resource for glob in rule.resources)
    return any(glob.matches(resource) for glob in rule.resources)
