"""What the gateway asks of access control: whose call it is, what it may use, and which limits hold for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from orla_lg.core.call import Assignment, Hints
from orla_lg.core.limits.limits import LimitScope
from orla_lg.errors import OrlaError


class KnownCaller(Protocol):
    """Whose call it is (``serve.access.Caller``)."""

    @property
    def tenants(self) -> tuple[str, ...] | None:
        """``None``: any."""
        ...

    @property
    def tags(self) -> Mapping[str, str]:
        """Of its key."""
        ...

    @property
    def backends(self) -> tuple[str, ...] | None:
        """``None``: any."""
        ...

    @property
    def stages(self) -> tuple[str, ...] | None:
        """``None``: any."""
        ...


class AccessControl(Protocol):
    """Who may call (``serve.access.Access``)."""

    def admit(self, headers: Mapping[str, str], *, scope: Any, loopback: bool) -> Any:
        """Return the caller.

        Raises:
            OrlaError: With ``status``, and ``retry_after_s`` or ``None``.
        """
        ...

    def layers(self, caller: Any) -> Sequence[LimitScope]:
        """Return the limits of the caller's key."""
        ...


class NotAllowed(OrlaError):
    """A caller's key does not reach that far."""

    status = 403
    retry_after_s: float | None = None


def narrowed(hints: Hints, caller: KnownCaller) -> Hints:
    """Return the hints with the tenant that the caller's key allows: it may narrow, never widen.

    Raises:
        NotAllowed: It names a tenant that is not the key's.
    """
    allowed = caller.tenants
    if allowed is None:
        return hints
    if hints.tenant is None:
        return replace(hints, tenant=allowed[0] if allowed else "")
    if hints.tenant not in allowed:
        raise NotAllowed(f"tenant {hints.tenant!r} is not one of this key's: {', '.join(allowed) or 'it has none'}")
    return hints


def check_stage(stage: str, caller: KnownCaller) -> None:
    """Refuse a stage that is not the key's.

    Raises:
        NotAllowed: It is not one of them.
    """
    if caller.stages is not None and stage not in caller.stages:
        shown = f"stage {stage!r}" if stage else "a call without a stage"
        raise NotAllowed(f"{shown} is not allowed to this key; stages that are: {', '.join(caller.stages) or 'none'}")


def within(assignment: Assignment, caller: KnownCaller) -> Assignment:
    """Return an assignment without the backends that are not the key's.

    Raises:
        NotAllowed: None of them is.
    """
    if (allowed := caller.backends) is None:
        return assignment
    named = (assignment.backend, *assignment.alternatives)
    able = [name for name in named if name in allowed]
    if len(able) == len(named):
        return assignment
    if not able:
        raise NotAllowed(
            f"backend {assignment.backend!r} is not allowed to this key; backends that are: "
            f"{', '.join(allowed) or 'none'}"
        )
    return replace(assignment, backend=able[0], alternatives=tuple(able[1:]))
