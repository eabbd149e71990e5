"""What a skill's manifest allows: the backends, tools and labels that it names, where it names any."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace

from orla_lg.core.call import Assignment
from orla_lg.serve.access.access import Denied
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedSkill

NOT_REGISTERED = "skill {!r} is not registered"


@dataclass(frozen=True, slots=True)
class SkillBounds:
    """What one skill may use; a list that is empty bounds nothing."""

    skill: str
    backends: Collection[str] = ()
    tools: Collection[str] = ()
    labels: Collection[str] = ()

    def fault(
        self, *, backend: str | None = None, tools: Iterable[str] = (), labels: Iterable[str] = ()
    ) -> str | None:
        """Return why the skill may not use one of these; ``None`` where it may use all."""
        asked = [("backend", self.backends, () if backend is None else (backend,))]
        for kind, named, used in (*asked, ("tool", self.tools, tools), ("label", self.labels, labels)):
            if named and (beyond := [each for each in used if each not in named]):
                return f"skill {self.skill!r} names no {kind} {beyond[0]!r} in its manifest"
        return None

    def narrow(self, assignment: Assignment) -> Assignment:
        """Return an assignment with the backends that the skill may use alone.

        Raises:
            Denied: There are none.
        """
        named = (assignment.backend, *assignment.alternatives)
        allowed = [each for each in named if not self.backends or each in self.backends]
        if not allowed:
            raise denied(f"{self.fault(backend=assignment.backend)}")
        return replace(assignment, backend=allowed[0], alternatives=tuple(allowed[1:]))


def denied(reason: str) -> Denied:
    """Return the error of a call that a skill's manifest does not allow."""
    return Denied(403, reason, "permission_denied")


def bounds_of(skill: str, items: PostedItems) -> SkillBounds | None:
    """Return the bounds of a skill; ``None`` where it is not registered."""
    stored = items.get(PostedSkill, skill)
    if stored is None:
        return None
    manifest = stored.item
    return SkillBounds(skill, manifest.requires_backends, manifest.requires_tools, manifest.requires_labels)
