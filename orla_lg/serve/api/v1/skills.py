"""What a skill's manifest allows: the backends, tools and labels that it names, where it names any."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedSkill


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


def bounds_of(skill: str, items: PostedItems) -> SkillBounds | None:
    """Return the bounds of a skill; ``None`` where it is not registered."""
    stored = items.get(PostedSkill, skill)
    if stored is None:
        return None
    manifest = stored.item
    return SkillBounds(skill, manifest.requires_backends, manifest.requires_tools, manifest.requires_labels)
