"""Posted policies, and the data labels of posted stages, as the core's guard heeds them."""

from __future__ import annotations

import logging

from orla_lg.core.guard.flow import StageLabels
from orla_lg.core.guard.guard import Guard
from orla_lg.core.guard.policies import AccessPolicy
from orla_lg.errors import ConfigError
from orla_lg.serve.posted.book import PostedItems
from orla_lg.serve.posted.items import PostedKind, PostedPolicy, PostedStage

log = logging.getLogger("orla_lg")


def guard_by(guard: Guard, items: PostedItems) -> None:
    """Have a guard heed what is posted; while a policy cannot be heeded, it allows nothing."""
    heeded, unread = list[AccessPolicy](), sorted(items.broken(PostedKind.POLICY))
    for posted in items.policies():
        try:
            heeded.append(policy_of(posted))
        except ConfigError as error:
            log.error("posted policy %r cannot be heeded, and so nothing is allowed: %s", posted.name, error)
            unread.append(posted.name)
    guard.set_policies(heeded, "posted")
    guard.set_closed(unread[0] if unread else "")
    labels = {name: each.item.data_labels for name, each in items.of(PostedStage).items()}
    guard.set_stage_labels({name: StageLabels(frozenset(said)) for name, said in labels.items() if said}, "posted")


def policy_of(posted: PostedPolicy) -> AccessPolicy:
    """Return a posted policy as the guard takes it.

    Raises:
        ConfigError: One of its patterns is none.
    """
    return AccessPolicy(posted.name, posted.subjects, posted.resources, posted.action)
