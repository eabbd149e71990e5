"""Step 4, queue: who goes next. Two levels, as in the Orla paper (section 2.2, Scheduling).

A *stage policy* orders the sub-queues of a backend by their heads; a *request policy* orders the calls
inside one sub-queue. Both return a key, and the smallest goes first. A new policy is one small class::

    class ShortestPrompt:
        def key(self, head: Queued, now: float) -> Sortable:
            return (head.call.ask.prompt_chars,)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol, cast

from orla_lg.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from orla_lg.core.queues import Queued

Sortable = tuple[Any, ...]


class StagePolicy(Protocol):
    """Which stage's sub-queue is served next; asked afresh at every dispatch."""

    def key(self, head: Queued, now: float) -> Sortable:
        """Return the sort key of a sub-queue by its head; *now* in monotonic seconds."""
        ...


class RequestPolicy(Protocol):
    """Which call inside a sub-queue goes next; asked when the call arrives or its hints change."""

    def key(self, head: Queued, now: float) -> Sortable:
        """Return the sort key of a call; *now* in monotonic seconds."""
        ...


class Fcfs:
    """First come, first served."""

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        return (head.order,)


class Priority:
    """Higher hinted priority first, first come first served among equals."""

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        return (-head.call.priority, head.order)


_NAMED = {"fcfs": Fcfs, "priority": Priority}


def policy(chosen: str | StagePolicy | RequestPolicy) -> StagePolicy:
    """Return the policy for a name, or the object itself.

    Raises:
        ConfigError: The name is unknown, or the object has no ``key``.
    """
    if isinstance(chosen, str):
        if chosen not in _NAMED:
            raise ConfigError(f"unknown scheduling policy {chosen!r}{did_you_mean(chosen, _NAMED)}")
        return cast("StagePolicy", _NAMED[chosen]())
    if not callable(getattr(chosen, "key", None)):
        raise ConfigError(f"{chosen!r} is no scheduling policy: it needs key(head, now)")
    return chosen
