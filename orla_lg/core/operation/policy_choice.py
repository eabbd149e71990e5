"""One policy for both levels of all queues, and what refines it: a choice as configurations and callers write it."""

from __future__ import annotations

from collections.abc import Mapping

from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.policies import ANY_BACKEND, RequestChoice, StageChoice, StagePolicy, policy
from orla_lg.errors import ConfigError, shown

PolicyChoice = str | StagePolicy
"""A policy for both levels of all queues."""


def refined(
    both: PolicyChoice | None, stage: StageChoice | None, request: RequestChoice | None
) -> tuple[StageChoice | None, RequestChoice | None]:
    """Return the choice for each level: its own, with *both* wherever that says nothing.

    Raises:
        ConfigError: *both* is no policy; a table, as the levels take one, is none.
    """
    if both is None:
        return stage, request
    if isinstance(both, Mapping):
        raise ConfigError(
            f"policy: one policy orders both levels, got {shown(both)}; stage_policy takes a table by backend, "
            "request_policy one by stage"
        )
    policy(both)
    return (
        {ANY_BACKEND: both, **stage} if isinstance(stage, Mapping) else both if stage is None else stage,
        {ANY_STAGE: both, **request} if isinstance(request, Mapping) else both if request is None else request,
    )
