"""Outside services that Orla's APIs name: one that maps stages, asked as v2's is.

For each call it is POSTed what ``mappers.http`` says, beside which each candidate has its prices under v2's names; it
answers ``{"backend": "NAME"}``, and an empty name declines. Whatever goes wrong there, the call is mapped without it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from orla_lg.core.call import Call
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import ConfigError
from orla_lg.mappers.http import HttpMapper
from orla_lg.serve.posted.allowed import Allowed
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedSetting

log = logging.getLogger("orla_lg")

PRICES = {
    "input_per_mtoken": "input_cost_per_mtoken",
    "output_per_mtoken": "output_cost_per_mtoken",
    "cached_input_per_mtoken": "cache_read_cost_per_mtoken",
}
"""Ours, and as v2 has them."""

STAGE_MAPPER, SCHEDULER_POLICY, COSTS = "stage-mapper", "scheduler-policy", "costs"


TagsOf = Callable[[str], Mapping[str, str]]
"""Returns the tags that a call came with, by its id."""


class StageHook(HttpMapper):
    """The outside mapper of one setting.

    Args:
        setting: Where it is, and how long a call waits for it.
        tags_of: Returns the tags that a call came with.
    """

    def __init__(self, setting: PostedSetting, tags_of: TagsOf) -> None:
        super().__init__(setting.url, setting.timeout_ms / 1000)
        self.setting = setting
        self._tags_of = tags_of

    def question(self, call: Call, backends: Sequence[BackendView]) -> dict[str, Any]:
        """Return what the service gets about a call."""
        asked = super().question(call, backends)
        asked["tags"] |= self._tags_of(call.id)
        for each in asked["candidates"]:
            each |= {theirs: each[ours] for ours, theirs in PRICES.items()}
        return asked


def hook_of(items: PostedItems, allowed: Allowed, before: StageHook | None, tags_of: TagsOf) -> StageHook | None:
    """Return the outside mapper that is posted; the one before where it is the same, with its counts."""
    stored = items.get(PostedSetting, STAGE_MAPPER)
    if stored is None or not stored.item.url:
        return None
    if before is not None and before.setting == stored.item:
        return before
    try:
        allowed.check_url("url", stored.item.url)
        return StageHook(stored.item, tags_of)
    except ConfigError as error:
        log.error("the posted stage mapper is left out: %s", error)
        return None
