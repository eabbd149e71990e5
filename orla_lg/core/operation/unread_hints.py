"""Hints that no policy in force reads: a call says how urgent it is, and is served in another order all the same."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping

from orla_lg.core.call import Call
from orla_lg.core.engine.backend import Capability
from orla_lg.core.policies import NAMES, EarliestDeadline, Priority, name_of
from orla_lg.core.queues import RequestPolicy, StagePolicy
from orla_lg.core.scheduler import BackendScheduler

log = logging.getLogger("orla_lg")

READ_BY: Mapping[str, type] = {"priority": Priority, "deadline_s": EarliestDeadline}
"""For each hint about order, the policy of ours that reads it. One of a user's own may read any."""


class UnreadHints:
    """Warns, once, of a hint that changes no order where its call is queued.

    Args:
        both_levels_meant: The policies of both queue levels were chosen, so that a hint which one of them reads is
            read as far as it was meant to be.
    """

    def __init__(self, *, both_levels_meant: bool) -> None:
        self._both_levels_meant = both_levels_meant
        self._warned = False
        self._unread: dict[tuple[type, type], tuple[str, ...]] = {}
        """The hints that two policies leave unread, by their classes."""
        self._found = itertools.count()
        """Takes one caller first, of several at once."""

    def look(self, call: Call, scheduler: BackendScheduler, *, waits: bool) -> None:
        """Warn if a hint of a call that entered a queue is not read there, the first time."""
        hints = call.hints
        if self._warned or (hints.priority is None and hints.deadline_s is None):
            return
        policies = scheduler.queue.policies
        levels = (policies.stage, policies.of(call.identity.stage))
        kinds = (type(levels[0]), type(levels[1]))
        if (unread := self._unread.get(kinds)) is None:
            unread = self._unread[kinds] = tuple(hint for hint in READ_BY if self._is_unread(hint, levels))
        for hint in unread:
            if (given := getattr(hints, hint)) is None:
                continue
            if hint == "priority" and not waits and _orders_itself(scheduler):
                continue
            self._warned = True
            if next(self._found) == 0:
                log.warning("%s", _warning(hint, given, call, scheduler.backend.name, levels))
            return

    def _is_unread(self, hint: str, levels: tuple[StagePolicy, RequestPolicy]) -> bool:
        reading = sum(_reads(policy, hint) for policy in levels)
        return reading == 0 or (reading == 1 and not self._both_levels_meant)


def _reads(policy: StagePolicy | RequestPolicy, hint: str) -> bool:
    return isinstance(policy, READ_BY[hint]) or name_of(policy) not in NAMES


def _orders_itself(scheduler: BackendScheduler) -> bool:
    """Whether the engine has a queue of its own that follows priorities, which a call that goes at once reaches."""
    probe = scheduler.health.probe
    return probe is not None and Capability.PRIORITY in probe.capabilities and probe.can(Capability.PRIORITY)


def _warning(hint: str, given: float, call: Call, backend: str, levels: tuple[StagePolicy, RequestPolicy]) -> str:
    stage, request = levels
    fix = name_of(READ_BY[hint]())
    if _reads(stage, hint):
        order = f"only the order of stages follows it, and calls of one stage go by {name_of(request)!r}"
    elif _reads(request, hint):
        order = f"only the order of calls of one stage follows it, and stages go by {name_of(stage)!r}"
    else:
        by = f"stages go by {name_of(stage)!r}, calls of one stage by {name_of(request)!r}"
        order = f"no policy in force reads it: {by}"
    where = f"stage {call.identity.stage!r}" if call.identity.stage else "a call outside any graph"
    return (
        f"hint {hint}={given:g} ({where}, backend {backend!r}): {order}; "
        f'Orla(policy="{fix}"), in orla.toml policy = "{fix}", orders both by it'
    )
