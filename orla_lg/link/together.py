"""Statistics of the cores of several pools as one: each call was at one core only, so figures add up."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce

from orla_lg.core.accounting.costs import Costs, Spent
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.workflow import WorkflowStatistics


def together(several: Sequence[Statistics]) -> Statistics:
    """Return the statistics of several cores as one; a run counts at each core whose pool it used."""
    return several[0] if len(several) == 1 else reduce(_both, several)


def _both(one: Statistics, other: Statistics) -> Statistics:
    return replace(
        one,
        backends={**one.backends, **other.backends},
        workflows=_workflows(one.workflows, other.workflows),
        calls=one.calls + other.calls,
        records_dropped=one.records_dropped + other.records_dropped,
        external=one.external + other.external,
        unidentified=one.unidentified + other.unidentified,
        costs=_costs(one.costs, other.costs),
        unwritten=one.unwritten + other.unwritten,
        limits=[*one.limits, *other.limits],
    )


def _workflows(one: WorkflowStatistics, other: WorkflowStatistics) -> WorkflowStatistics:
    outcomes = dict(Counter(one.outcomes) + Counter(other.outcomes))
    return WorkflowStatistics(one.runs + other.runs, one.running + other.running, one.idle + other.idle, outcomes)


def _costs(one: Costs, other: Costs) -> Costs:
    return Costs(
        _spent(one.total, other.total), _tables(one.stages, other.stages), _tables(one.runs, other.runs),
        _tables(one.tenants, other.tenants), _tables(one.backends, other.backends),
    )  # fmt: skip


def _tables(one: Mapping[str, Spent], other: Mapping[str, Spent]) -> dict[str, Spent]:
    return {**one, **{key: _spent(one[key], each) if key in one else each for key, each in other.items()}}


def _spent(one: Spent, other: Spent) -> Spent:
    return Spent(
        one.usd + other.usd, one.calls + other.calls, one.prompt_tokens + other.prompt_tokens,
        one.cached_tokens + other.cached_tokens, one.completion_tokens + other.completion_tokens,
    )  # fmt: skip
