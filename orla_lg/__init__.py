"""orla_lg: serving middleware for LangGraph. See ``Orla`` and docs/architecture.md."""

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
    ReleaseOnly,
    WarmNextStage,
    WarmReturns,
)
from orla_lg.core.placement.view import BackendView
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.queues import Queued, RequestPolicy, StagePolicy
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.core.serving import Statistics
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
    QueueFull,
    RecordUnknown,
    StageError,
    WorkflowError,
)
from orla_lg.graph.chat_model import ChatOrla
from orla_lg.graph.saver import OrlaSaver
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
    "PreserveIncrements",
    "Probe",
    "QueueFull",
    "Queued",
    "Record",
    "RecordUnknown",
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
