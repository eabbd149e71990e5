"""orla_lg: serving middleware for LangGraph. See ``Orla`` and docs/architecture.md."""

from orla_lg import mappers as _mappers
from orla_lg.arguments import answer_wrong_arguments as _answer
from orla_lg.control.client import Client as _ControlClient
from orla_lg.core import policies as _policies
from orla_lg.core.call import Ask, Assignment, Call, Chunk, Considered, Hints, Usage
from orla_lg.core.engine.backend import Backend, Capability, Cost, Effect, Probe, Support
from orla_lg.core.limits.costs import Costs, Spent
from orla_lg.core.limits.limits import Limit, Limits
from orla_lg.core.lookahead.estimates import Learned
from orla_lg.core.lookahead.forecast import Ahead, StageOutlook
from orla_lg.core.mapping import Planned, StageMapper
from orla_lg.core.memory.events import CacheAction, CacheEvent, EventKind, Holding, MemoryPolicy, Returns, Verb
from orla_lg.core.memory.policies import (
    DemoteInterrupted,
    FlushAtBoundary,
    FlushPerRequest,
    FlushUnderPressure,
    Joined,
    PreserveIncrements,
    ReleaseAtSwitch,
    ReleaseOnly,
    WarmNextStage,
    WarmReturns,
)
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.placement.view import BackendView
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.queues import Queued, RequestPolicy, StagePolicy
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.errors import (
    BackendUnavailable,
    BudgetExceeded,
    CallRefused,
    ConfigError,
    DeadlineExceeded,
    EngineError,
    MappingError,
    OrlaClosed,
    OrlaError,
    PolicyError,
    QueueFull,
    RecordUnknown,
    StageError,
    WorkflowError,
)
from orla_lg.graph.chat_model import ChatOrla
from orla_lg.graph.saver import OrlaSaver
from orla_lg.graph.stage_tree import StageTree
from orla_lg.mappers.table import ExplicitMapper
from orla_lg.orla import Current, Orla
from orla_lg.workflow import Stage, StageResult, Upstream, Workflow

__version__ = "0.1.0"

__all__ = [
    "Ahead",
    "Ask",
    "Assignment",
    "Backend",
    "BackendUnavailable",
    "BackendView",
    "BudgetExceeded",
    "CacheAction",
    "CacheEvent",
    "Call",
    "CallEvent",
    "CallRefused",
    "Capability",
    "ChatOrla",
    "Chunk",
    "ConfigError",
    "Considered",
    "Cost",
    "Costs",
    "Current",
    "DeadlineExceeded",
    "DemoteInterrupted",
    "Effect",
    "EngineError",
    "EventKind",
    "ExplicitMapper",
    "FlushAtBoundary",
    "FlushPerRequest",
    "FlushUnderPressure",
    "Happening",
    "Hints",
    "Holding",
    "Joined",
    "Learned",
    "Limit",
    "Limits",
    "MappingError",
    "MemoryPolicy",
    "Orla",
    "OrlaClosed",
    "OrlaError",
    "OrlaSaver",
    "Planned",
    "PolicyError",
    "PreserveIncrements",
    "Probe",
    "QueueFull",
    "Queued",
    "Record",
    "RecordUnknown",
    "ReleaseAtSwitch",
    "ReleaseOnly",
    "RequestPolicy",
    "Returns",
    "Spent",
    "Stage",
    "StageError",
    "StageMapper",
    "StageOutlook",
    "StagePolicy",
    "StageResult",
    "StageTree",
    "Statistics",
    "Support",
    "Upstream",
    "Usage",
    "Verb",
    "WarmNextStage",
    "WarmReturns",
    "WarmUp",
    "Workflow",
    "WorkflowError",
]

_MADE_BY_CALLS = {
    "Ahead", "Ask", "Assignment", "BackendView", "CacheAction", "CacheEvent", "Call", "CallEvent", "Chunk",
    "Considered", "Costs", "Current", "Holding", "Learned", "Planned", "Queued", "Record", "Returns", "Spent",
    "StageOutlook", "StageResult", "Statistics", "Upstream", "Usage",
}  # fmt: skip
"""Values that model calls are made of, many for each: their constructors stay as they are."""


def _are_made_by_users() -> list[type]:
    """Return the classes of the public API that a program makes, and gives options to."""
    named = [globals()[name] for name in __all__ if name not in _MADE_BY_CALLS]
    named += [_ControlClient, *(getattr(_mappers, name) for name in _mappers.__all__)]
    named += [made for made in vars(_policies).values() if hasattr(made, "key")]
    return [
        each
        for each in dict.fromkeys(named)
        if isinstance(each, type) and "orla_lg" in each.__module__ and not getattr(each, "_is_protocol", False)
        and not issubclass(each, (BaseException, str, ChatOrla))
    ]  # fmt: skip


_answer(*(each for each in _are_made_by_users() if each not in (Orla, Workflow)))
_answer(Orla, Workflow, methods=True)
