"""The guard of a core: which backends, tools, labels and skills a call may use, by all policies that hold now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

from orla_lg.core.guard.policies import ALLOWED, AccessPolicy, PolicyEvaluator, Verdict
from orla_lg.core.guard.subject import AccessSubject
from orla_lg.errors import ConfigError, shown

Source = Literal["file", "code", "posted"]

SOURCES: tuple[Source, ...] = ("file", "code", "posted")
"""Where policies come from. Of two with one name the one of the earlier source holds."""

EXTERNAL = "external"
"""The backend of a call that goes where its code says, to policies."""


class Guard:
    """Holds the policies of a core, from all sources, and decides by them. Any thread may ask and set.

    Args:
        install: Has the core ask this guard, or none where it has nothing to say.
    """

    def __init__(self, install: Callable[[Guard | None], None] = lambda _: None) -> None:
        self._install = install
        self._sources: dict[Source, tuple[AccessPolicy, ...]] = {}
        self._evaluator = PolicyEvaluator(())

    @property
    def policies(self) -> tuple[AccessPolicy, ...]:
        """The policies that hold now."""
        return self._evaluator.policies

    def source_of(self, name: str) -> Source | None:
        """Return where the policy of that name comes from; ``None`` where there is none."""
        return next((source for source in SOURCES if name in names(self._sources.get(source, ()))), None)

    def of_source(self, source: Source) -> tuple[AccessPolicy, ...]:
        """Return the policies of one source, those included that an earlier source replaces."""
        return self._sources.get(source, ())

    def set_policies(self, policies: Iterable[AccessPolicy], source: Source = "posted") -> None:
        """Let these be all policies of their source, at once; calls that already wait keep what was decided.

        Raises:
            ConfigError: Two have one name.
        """
        given = checked_policies(policies)
        merged: dict[str, AccessPolicy] = {}
        sources = {**self._sources, source: given}
        for each in SOURCES:
            merged |= {policy.name: policy for policy in sources.get(each, ()) if policy.name not in merged}
        self._sources, self._evaluator = sources, PolicyEvaluator(merged.values())
        self._install(self if self.policies else None)

    def verdict(
        self,
        subject: AccessSubject,
        *,
        backend: str | None = None,
        tools: Iterable[str] = (),
        labels: Iterable[str] = (),
        skill: str | None = None,
    ) -> Verdict:
        """Return whether a subject may use all of these; if not, by which policy, and why.

        What is denied is named in this order: skill, backend, tools, labels. A label must be allowed for the
        subject's tags and, where a backend is given, for the subject ``backend:NAME``.
        """
        evaluator, labels = self._evaluator, tuple(labels)
        asked = [] if skill is None else [("skill", skill)]
        asked += [] if backend is None else [("backend", backend)]
        asked += [*(("tool", name) for name in tools), *(("data", label) for label in labels)]
        last = ALLOWED
        for kind, name in asked:
            for subjects in subject.sets:
                said = evaluator.verdict(subjects, kind, name)
                if not said.allowed:
                    return said
                last = said if said.rule else last
        for label in labels if backend is not None else ():
            said = evaluator.verdict(frozenset((f"backend:{backend}",)), "data", label)
            if not said.allowed:
                return said
        return last


def names(policies: Iterable[AccessPolicy]) -> set[str]:
    """Return the names of policies."""
    return {policy.name for policy in policies}


def checked_policies(policies: Iterable[AccessPolicy]) -> tuple[AccessPolicy, ...]:
    """Return policies as a tuple; what is none, or has the name of another one, is a ``ConfigError``."""
    if isinstance(policies, str | bytes | Mapping) or not isinstance(policies, Iterable):
        raise ConfigError(f"policies must be a list of AccessPolicy, got {shown(policies)}")
    given = tuple(policies)
    known: set[str] = set()
    for policy in given:
        if not isinstance(policy, AccessPolicy):
            raise ConfigError(f"policies: each of them must be an AccessPolicy, got {shown(policy)}")
        if policy.name in known:
            raise ConfigError(f"policies: two have the name {policy.name!r}")
        known.add(policy.name)
    return given
