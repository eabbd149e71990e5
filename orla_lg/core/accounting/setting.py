"""What a records file has of the setting that its calls were served in: backends, sizes, policies, prices."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from orla_lg.core.engine.backend import Capability
from orla_lg.core.policies import name_of
from orla_lg.core.scheduler import BackendScheduler

MOST_STAGES = 100
"""Of one backend, so many stages with a policy of their own are written down."""


def setting_of(
    known: Callable[[], Mapping[str, BackendScheduler] | None], *, admission: bool, memory: object
) -> dict[str, Any]:
    """Return the setting as plain data, without any address or key; nothing of a core that is gone.

    Args:
        known: Returns the backends, by a weak reference: a file must not keep a core.
        admission: Whether calls wait until their cache fits.
        memory: The policy of caches.
    """
    if (schedulers := known()) is None:
        return {}
    backends = {name: _backend(scheduler) for name, scheduler in list(schedulers.items())}
    return {"backends": backends, "admission": admission, "memory": type(memory).__name__}


def _backend(scheduler: BackendScheduler) -> dict[str, Any]:
    backend, probe, ordered_by = scheduler.backend, scheduler.health.probe, scheduler.queue.policies
    made: dict[str, Any] = {
        "engine": backend.engine,
        "capacity": backend.capacity,
        "max_concurrency": backend.max_concurrency,
        "stage_policy": name_of(ordered_by.stage),
        "request_policy": {
            stage: name_of(each) for stage, each in list(ordered_by.requests.items())[:MOST_STAGES]
        },
        "prices": [
            backend.cost.input_per_mtoken, backend.cost.output_per_mtoken, backend.cost.cached_input_per_mtoken,
        ],
    }  # fmt: skip
    if probe is not None:
        made |= {"kv_tokens": probe.kv_tokens, "context_tokens": probe.context_tokens, "slots": probe.slots,
                 "can": sorted(str(each) for each in Capability if probe.can(each))}  # fmt: skip
    return made
