"""What access policies need to know of one call, beside the call itself; the edge that makes the call says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from orla_lg.core.guard.subject import AccessSubject


@dataclass(frozen=True, slots=True)
class CallAccess:
    """Tags, tools, labels and skill of a call."""

    subject: AccessSubject | None = None
    """``None``: as the calls of this ``Orla`` are."""
    tools: Sequence[str] | None = None
    """Names of the tools that it offers; ``None``: as its request describes them."""
    labels: frozenset[str] = frozenset()
    """That its caller claims, beside those that its stage has and that reach it."""
    skill: str | None = None
    stage: str | None = None
    """Whose prompt it carries, where that is another stage's than its own (a judge's call)."""
    carried: frozenset[str] | None = None
    """Its labels, once the guard looked at it: its stage's, those that reach it, and those that are claimed."""
    may_leave: bool = True
    """Mappers may show it to what is no backend of ours: it has no labels, or they are allowed at ``external``."""


NO_ACCESS = CallAccess()


def on_behalf(access: CallAccess | None, stage: str) -> CallAccess:
    """Return the same for a call that is made on the way of one of *stage*, and carries its prompt."""
    access = NO_ACCESS if access is None else access
    return replace(access, tools=(), stage=stage if access.stage is None else access.stage)


def tool_names(schemas: Sequence[Any]) -> list[str]:
    """Return the names of the tools that a request describes, in whichever wire."""
    found = []
    for schema in schemas:
        if isinstance(schema, Mapping):
            function = schema.get("function")
            named = function.get("name") if isinstance(function, Mapping) else None
            name = schema.get("name") or schema.get("type") if named is None else named
            found.append(str(name))
    return found
