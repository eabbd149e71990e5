"""The guard of a core: which backends, tools, labels and skills a call may use, by all policies that hold now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Literal

from orla_lg.core.call import Assignment, Call
from orla_lg.core.guard.access import NO_ACCESS, tool_names
from orla_lg.core.guard.flow import NONE, StageLabels
from orla_lg.core.guard.labels import LabelFlow
from orla_lg.core.guard.policies import ALLOWED, AccessPolicy, PolicyEvaluator, Verdict
from orla_lg.core.guard.subject import NO_SUBJECT, AccessSubject, checked_tags
from orla_lg.core.lookahead.structure import GraphStructure
from orla_lg.core.workflow import RunState
from orla_lg.errors import AccessDenied, ConfigError, shown

Source = Literal["file", "code", "posted"]

SOURCES: tuple[Source, ...] = ("file", "code", "posted")
"""Where policies come from. Of two with one name the one of the earlier source holds."""

EXTERNAL = "external"
"""What policies call the backend of a call that goes where its code says."""

MOST_ORIGINS = 3
"""Stages that a message names from which a call has its labels."""


class Guard:
    """Holds the policies of a core, from all sources, and decides by them. Any thread may ask and set.

    Args:
        run_of: Returns an open run.
    """

    def __init__(self, run_of: Callable[[str], RunState | None] = lambda run: None) -> None:
        self.flow = LabelFlow()
        self.tags: Mapping[str, str] = {}
        """Of every call of this ``Orla``; a key may have others."""
        self.subject = NO_SUBJECT
        """These, as policies see them."""
        self.elsewhere = False
        """Policies are another process's, which is asked for each call; what is not asked there is denied here."""
        self.closed = ""
        """A policy that holds and cannot be read, by name: until that is mended nothing is allowed."""
        self._install: Callable[[Guard | None], None] = lambda guard: None
        self._run_of = run_of
        self._sources: dict[Source, tuple[AccessPolicy, ...]] = {}
        self._stages: dict[Source, Mapping[str, StageLabels]] = {}
        self._evaluator = PolicyEvaluator(())
        self.changed: list[Callable[[], None]] = []
        """Called after the policies have changed."""

    def installed_by(self, install: Callable[[Guard | None], None]) -> None:
        """Have *install* put this guard into the path of calls while there is something to look for."""
        self._install = install
        self._look()

    def _look(self) -> None:
        self._install(self if self.policies or self.flow.follows or self.elsewhere or self.closed else None)

    # What holds

    @property
    def policies(self) -> tuple[AccessPolicy, ...]:
        """The policies that hold now."""
        return self._evaluator.policies

    def source_of(self, name: str) -> Source | None:
        """Return where the policy of that name comes from; ``None`` where there is none."""
        return next((source for source in SOURCES if name in names(self.of_source(source))), None)

    def of_source(self, source: Source) -> tuple[AccessPolicy, ...]:
        """Return the policies of one source, those included that an earlier source replaces."""
        return self._sources.get(source, ())

    def set_policies(self, policies: Iterable[AccessPolicy], source: Source = "posted") -> None:
        """Let these be all policies of their source, at once; calls that already wait keep what was decided.

        Raises:
            ConfigError: Two have one name.
        """
        sources = {**self._sources, source: checked_policies(policies)}
        merged: dict[str, AccessPolicy] = {}
        for each in SOURCES:
            merged |= {policy.name: policy for policy in sources.get(each, ()) if policy.name not in merged}
        before, self._sources = self.policies, sources
        self._evaluator = PolicyEvaluator(merged.values())
        self._look()
        if self.policies != before:
            for changed in self.changed:
                changed()

    def set_closed(self, policy: str) -> None:
        """Allow nothing while a policy, by its name, cannot be read; an empty name: all can."""
        before, self.closed = self.closed, policy
        self._look()
        if policy != before:
            for changed in self.changed:
                changed()

    @property
    def restricts(self) -> bool:
        """Whether calls must be asked for."""
        return bool(self.policies or self.closed)

    def set_elsewhere(self, elsewhere: bool) -> None:
        """Note whether another process has policies, which is asked for each call."""
        self.elsewhere = elsewhere
        self._look()

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Let these be the tags of every call of this ``Orla``."""
        self.tags = checked_tags("tags", tags)
        self.subject = AccessSubject.of(self.tags)

    def subject_of(self, tags: Mapping[str, str], claimed: Mapping[str, str], *, trusted: bool) -> AccessSubject:
        """Return who a call is that comes from elsewhere (``AccessSubject.of``): a key's tags stand over our own."""
        return AccessSubject.of({**self.tags, **tags} if self.tags else tags, claimed, trusted=trusted)

    def set_stage_labels(self, stages: Mapping[str, StageLabels], source: Source = "posted") -> None:
        """Let these be all labels of stages, by name, that their source declares; those of all sources add up."""
        self._stages[source] = dict(stages)
        table: dict[str, StageLabels] = {}
        for each in self._stages.values():
            for name, said in each.items():
                known = table.get(name, StageLabels())
                table[name] = StageLabels(known.labels | said.labels, known.declassifies | said.declassifies)
        self.flow.set_table(table)
        self._look()

    def stages_of(self, source: Source) -> Mapping[str, StageLabels]:
        """Return what a source declares of stages, by name."""
        return self._stages.get(source, {})

    def heed(self, structure: GraphStructure) -> None:
        """Follow labels from now on if a graph declares some."""
        if not self.flow.follows:
            self.flow.heed(structure)
            self._look()

    def set_graph(self, workflow: str, name: str, structure: GraphStructure) -> None:
        """Let a workflow, by its key, whose runs tell of no graph have this one."""
        self.flow.set_graph(workflow, name, structure)
        self._look()

    def claims(self, labels: frozenset[str]) -> None:
        """Follow labels from now on if a caller claims some."""
        if labels and not self.flow.follows:
            self.flow.follows = True
            self._look()

    # What is decided

    def look_at(self, call: Call) -> None:
        """Note, before a call is mapped, which labels it carries, and whether mappers may show it to others."""
        access = call.access or NO_ACCESS
        labels = self.labels_of(call) if self.flow.follows or access.labels else NONE
        subject = self.subject if access.subject is None else access.subject
        may_leave = not labels or self.verdict(subject, backend=EXTERNAL, labels=labels).allowed
        may_leave &= not self.elsewhere
        call.access = replace(access, carried=labels, may_leave=may_leave)

    def narrowed(self, call: Call, assignment: Assignment | None) -> Assignment | None:
        """Return *assignment* with the backends alone that the call may go to; ``None`` where nothing places it.

        Raises:
            AccessDenied: It may not go at all.
        """
        if self.elsewhere:
            raise AccessDenied(
                "the server's access policies must allow this call, and it cannot be asked: the core is lost, or the "
                "request is none that the core places"
            )
        if self.closed:
            raise AccessDenied(_unread(self.closed), rule=self.closed)
        if call.access is None or call.access.carried is None:
            self.look_at(call)
        if not self.policies:
            return assignment
        access = call.access or NO_ACCESS
        labels = access.carried or NONE
        subject = self.subject if access.subject is None else access.subject
        tools = tool_names(call.ask.schemas) if access.tools is None else access.tools
        named = (EXTERNAL,) if assignment is None else (assignment.backend, *assignment.alternatives)
        denied, allowed = None, list[str]()
        for backend in named:
            said = self.verdict(subject, backend=backend, tools=tools, labels=labels, skill=access.skill)
            if said.allowed:
                allowed.append(backend)
            elif denied is None:
                denied = said
        if denied is None:
            return assignment
        if not allowed or assignment is None:
            where = f"stage {call.identity.stage!r}" if call.identity.stage else "a call of no stage"
            why = f"{denied.reason}{self._origin(call, labels)}"
            raise AccessDenied(f"{where} on backend {named[0]!r}: {why}", rule=denied.rule)
        reason = assignment.reason
        if allowed[0] != assignment.backend:
            reason = f"{reason}; not {assignment.backend!r}: {denied.reason}"
        return replace(assignment, backend=allowed[0], alternatives=tuple(allowed[1:]), reason=reason)

    def _origin(self, call: Call, labels: frozenset[str]) -> str:
        """Return what is known of where a denied call's labels come from, for the end of a message."""
        stages = self.flow.brought_by(call.identity.workflow, labels) if labels else []
        others = [stage for stage in stages if stage != call.identity.stage][:MOST_ORIGINS]
        names = ", ".join(map(repr, others))
        return f"; it carries {', '.join(map(repr, sorted(labels)))}, entered with stage {names}" if others else ""

    def labels_of(self, call: Call) -> frozenset[str]:
        """Return the labels that a call carries, and note those that it brings into its workflow."""
        access, identity = call.access or NO_ACCESS, call.identity
        run = None if identity.run is None else self._run_of(identity.run)
        stage = identity.stage if access.stage is None else access.stage
        return self.flow.carried(identity.workflow, run, stage, access.labels, lasts=identity.thread)

    def may_extend(self, run: RunState, stage: str) -> bool:
        """Whether what follows on a call of *stage*, in the same stage, may be prefilled before it is asked for.

        Whose tags that call will have is not known, so nothing with labels is, where policies speak of labels.
        """
        if not (self.flow.follows and self._evaluator.speaks_of("data")):
            return True
        return not self.flow.carried(run.workflow, run, stage)

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
        if self.closed:
            return Verdict(False, self.closed, _unread(self.closed))
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


def _unread(policy: str) -> str:
    return f"policy {policy!r} cannot be read, and so nothing is allowed until it is replaced or removed"


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
