"""What the gateway asks of access control: what a caller may do, and which limits hold for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from orla_lg.core.call import Hints
from orla_lg.core.limits.limits import LimitScope
from orla_lg.serve.access import Caller


class AccessControl(Protocol):
    """What lets callers in (``serve.access.Access``)."""

    def admit(self, headers: Sequence[tuple[bytes, bytes]], *, scope: Any, loopback: bool) -> Caller:
        """Return the caller.

        Raises:
            OrlaError: With ``status``, and ``retry_after_s`` or ``None``.
        """
        ...

    def layers(self, caller: Caller) -> Sequence[LimitScope]:
        """Return the limits of the caller's key."""
        ...


def narrowed(hints: Hints, caller: Caller) -> Hints:
    """Return the hints with the tenant that the caller's key allows: it may narrow, never widen.

    Raises:
        Denied: It names a tenant that is not the key's.
    """
    return hints if caller.tenants is None else replace(hints, tenant=caller.tenant_of(hints.tenant) or "")
