"""Step 4, queue: who goes next. Two levels, as in the Orla paper (section 2.2, Scheduling).

A *stage policy* orders the sub-queues of a backend by their heads; a *request policy* orders the calls
inside one sub-queue. Both return a key, and the smallest goes first. A new policy is one small class::

    class ShortestPrompt:
        def key(self, head: Queued, now: float) -> Sortable:
            return (head.call.ask.prompt_chars,)

A request policy is asked when a call arrives, when its hints change, and, if it says ``follows_service = True``, when
a call of the same workflow ends. A stage policy is asked afresh at every dispatch, or, if it says ``steady = True``,
at the same moments as a request policy: where there are many stages that is most of what a dispatch costs. A policy
with ``granted(head)`` gets each call that goes. Under every policy a call that waited too long for room in a prefix
cache goes first (``cache.prefix.admission``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import count
from math import floor, inf

from orla_lg.arguments import answering
from orla_lg.core.boundary import checked, removed
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.queues import Policies, Queued, RequestPolicy, Sortable, StagePolicy
from orla_lg.errors import ConfigError, did_you_mean, shown

__all__ = [
    "ANY_BACKEND",
    "ANY_STAGE",
    "NAMES",
    "EarliestDeadline",
    "Fair",
    "Fcfs",
    "FinalFirst",
    "LeastAttained",
    "Policies",
    "Priority",
    "RequestChoice",
    "RequestPolicy",
    "ShortestJob",
    "ShortestRemaining",
    "Sortable",
    "StageChoice",
    "StagePolicy",
    "WorkflowFcfs",
    "changed",
    "name_of",
    "policies",
    "policy",
]

KEEP_TENANTS = 1000
DEFAULT_STAGE, DEFAULT_REQUEST = "workflow_fcfs", "workflow_fcfs"

_MARKS = count()
"""Numbers for policies that leave marks on calls; a number instead of the policy keeps the marks plain data."""


class Fcfs:
    """First come, first served, call by call."""

    steady = True

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        return (head.order,)


class WorkflowFcfs:
    """First come, first served, run by run: whoever began earlier finishes earlier (ThunderAgent, Orla)."""

    steady = True

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        return (head.call.standing.order, head.order)


@answering
class Priority:
    """Higher hinted priority first; a call gains one step of priority for every ``ageing_s`` it waits.

    All that wait age alike, so the order of two calls never changes and a key computed once stays right.
    """

    steady = True

    def __init__(self, ageing_s: float = 30.0) -> None:
        if ageing_s != inf:
            checked.number("ageing_s (math.inf: never)", ageing_s, above=0)
        self.ageing_s = ageing_s

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        return (head.call.arrived_s / self.ageing_s - head.call.priority, head.order)


class ShortestJob:
    """The call with the fewest expected tokens first."""

    steady = True

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        return (head.call.expected_tokens, head.order)


class LeastAttained:
    """The run that had least of the engines lately first, in bands that double; inside a band by arrival.

    Long runs sink as they go on, so that short ones pass without anybody knowing lengths beforehand
    (multi-level feedback; Nuyens and Wierman, 2008). Service counts less as it ages (``RunShare``), for all runs
    alike, so waiting does not change the order of two runs and a key computed once stays right until one is served.
    """

    steady = follows_service = True

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        standing = head.call.standing
        band = floor(standing.magnitude) if standing.tokens_served else -inf
        return (band, standing.order, head.order)


class EarliestDeadline:
    """The earliest deadline first; calls without one after all others."""

    steady = True

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        due_s = head.call.deadline_at_s
        return (inf if due_s is None else due_s, head.order)


class ShortestRemaining:
    """The run with the least service still expected first; one of which nothing is known goes last."""

    steady = follows_service = True

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        remaining_s = head.call.standing.remaining_s
        return (inf if remaining_s is None else remaining_s, head.call.standing.order, head.order)


@answering
class FinalFirst:
    """First come, first served, run by run, with a head start for a call that is likely the last of its run.

    Such a call counts as if its run had begun up to ``head_start`` runs earlier, in proportion to the odds that no
    call of the run follows it. So a call is passed by those of the next ``head_start`` runs at most: none starves.
    """

    steady = True

    def __init__(self, head_start: float = 64) -> None:
        self.head_start = checked.number("head_start (runs)", head_start, least=0)

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        call = head.call
        if (odds := call.final_odds) is None:
            odds = call.final_odds = call.standing.final_odds(call.identity.stage, call.nth)
        return (call.standing.order - self.head_start * odds, head.order)


@answering
class Fair:
    """Weighted shares for tenants: whoever had less of this backend for its weight goes first.

    Start-time fair queueing (Goyal, Vin and Cheng, 1996): a call starts, in virtual time, where its tenant's last one
    ended or at the virtual time of now, whichever is later, so nobody saves up a claim while idle.

    Args:
        weights: By tenant; others weigh 1.

    Raises:
        ConfigError: A weight is not positive.
    """

    steady = True

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        if weights is not None and not isinstance(weights, Mapping):
            raise ConfigError(f"weights must be numbers by tenant, got {shown(weights)}")
        for tenant, weight in (weights or {}).items():
            checked.number(f"weights of tenants: {shown(tenant)}", weight, above=0)
        self._weights = dict(weights or {})
        self._mark = next(_MARKS)
        self._virtual = 0.0
        self._ends: dict[str, float] = {}
        """By tenant, when in virtual time its last call ends; those of the past are forgotten."""

    def key(self, head: Queued, now: float) -> Sortable:  # noqa: D102
        if head.marks is None:
            head.marks = {}
        if (start := head.marks.get(self._mark)) is None:
            tenant = head.call.hints.tenant or ""
            start = head.marks[self._mark] = max(self._virtual, self._ends.get(tenant, 0.0))
            self._ends[tenant] = start + head.call.expected_tokens / self._weights.get(tenant, 1.0)
            if len(self._ends) > KEEP_TENANTS:
                self._ends = {name: end for name, end in self._ends.items() if end > self._virtual}
        return (start, head.order)

    def granted(self, head: Queued) -> None:
        """Let virtual time go on to the start of the call that goes."""
        if head.marks is not None:
            self._virtual = max(self._virtual, head.marks.get(self._mark, 0.0))


_NAMED: Mapping[str, Callable[[], StagePolicy]] = {
    "edf": EarliestDeadline,
    "fair": Fair,
    "fcfs": Fcfs,
    "final_first": FinalFirst,
    "las": LeastAttained,
    "priority": Priority,
    "shortest_remaining": ShortestRemaining,
    "sjf": ShortestJob,
    "workflow_fcfs": WorkflowFcfs,
}

NAMES = tuple(_NAMED)
"""Of the policies that come with orla_lg."""

ANY_BACKEND = "*"

StageChoice = str | StagePolicy | Mapping[str, str | StagePolicy]
"""A stage policy for all backends, or one for each; ``"*"`` is any other."""

RequestChoice = str | RequestPolicy | Mapping[str, str | RequestPolicy]
"""A request policy for all stages, or one for each; ``"*"`` is any other."""


def policies(backend: str, stage: StageChoice, request: RequestChoice) -> Policies:
    """Return the policies of a backend; each named one anew, so that no two backends share an account.

    Inside a backend a name means one policy: one that keeps account (``fair``) must see both levels, or its two
    accounts disagree about who had how much.

    Raises:
        ConfigError: A name is unknown, or an object is no policy.
    """
    by_backend = stage if isinstance(stage, Mapping) else {ANY_BACKEND: stage}
    by_stage = request if isinstance(request, Mapping) else {ANY_STAGE: request}
    chosen = by_backend.get(backend) or by_backend.get(ANY_BACKEND, DEFAULT_STAGE)
    one = _one_each({})
    requests = {name: one(each) for name, each in by_stage.items()}
    return Policies(one(chosen), {ANY_STAGE: one(DEFAULT_REQUEST), **requests})


def changed(before: Policies, backend: str, stage: StageChoice | None, request: RequestChoice | None) -> Policies:
    """Return the policies of a backend after a change; ``None``, and what a dict does not name, stays as it was.

    Raises:
        ConfigError: A name is unknown, or an object is no policy.
    """
    by_backend = stage if isinstance(stage, Mapping) else {} if stage is None else {ANY_BACKEND: stage}
    by_stage = request if isinstance(request, Mapping) else {} if request is None else {ANY_STAGE: request}
    chosen = by_backend.get(backend, by_backend.get(ANY_BACKEND))
    one = _one_each({name_of(each): each for each in (before.stage, *before.requests.values())})
    requests = {name: one(each) for name, each in by_stage.items()}
    kept = {} if ANY_STAGE in requests else before.requests
    return Policies(before.stage if chosen is None else one(chosen), {**kept, **requests})


def _one_each(named: dict[str, StagePolicy]) -> Callable[[str | StagePolicy | RequestPolicy], StagePolicy]:
    """Return how to choose policies of which no name is made twice; those in *named* go on with their accounts."""

    def one(choice: str | StagePolicy | RequestPolicy) -> StagePolicy:
        if not isinstance(choice, str):
            return policy(choice)
        if choice not in named:
            named[choice] = policy(choice)
        return named[choice]

    return one


def name_of(policy: StagePolicy | RequestPolicy) -> str:
    """Return the name that a policy is chosen by; for one that has none, its class's."""
    return next((name for name, made in _NAMED.items() if made is type(policy)), type(policy).__name__)


def policy(chosen: str | StagePolicy | RequestPolicy) -> StagePolicy:
    """Return a policy of that name, or the object itself.

    Raises:
        ConfigError: The name is unknown, or the object has no ``key``.
    """
    if isinstance(chosen, str):
        if chosen not in _NAMED:
            removed.refuse("policy", chosen)
            raise ConfigError(f"unknown scheduling policy {shown(chosen)}{did_you_mean(chosen, _NAMED)}")
        return _NAMED[chosen]()
    if isinstance(chosen, type):
        raise ConfigError(f"{chosen.__name__} is a class; give an object of it: {chosen.__name__}()")
    if not callable(getattr(chosen, "key", None)):
        raise ConfigError(f"{shown(chosen)} is no scheduling policy: it needs key(head, now)")
    return chosen
