"""The end of a call whose attempts all failed."""

from __future__ import annotations

from typing import NoReturn

from orla_lg.core.boundary.plain import counted
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.errors import BackendUnavailable


def give_up(inflight: InFlightCall, failure: AttemptFailed) -> NoReturn:
    """End a call's attempts with what the last one met."""
    if not failure.unreachable:
        raise failure.cause from failure.cause.__cause__  # what the engine said, as without us
    schedulers, tried = inflight.services.schedulers, inflight.tried
    where = ", ".join(f"{name!r} ({schedulers[name].backend.url})" for name in dict.fromkeys(tried))
    attempts = counted(len(tried), "attempt")
    raise BackendUnavailable(
        f"no engine answered at backend {where} in {attempts}: {str(failure.cause).rstrip('.')}; "
        f"is it running? `orla-lg check` probes it"
    ) from failure.cause
