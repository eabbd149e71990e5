"""orla_lg: serving middleware for LangGraph. See ``Orla`` and docs/architecture.md.

A public name is imported when it is asked for: the command line, and code that needs the core alone, start without
LangChain, LangGraph and the OpenAI SDK.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orla_lg.core.accounting.costs import Costs, Spent
    from orla_lg.core.call import Ask, Assignment, Call, Chunk, Considered, Hints, Usage
    from orla_lg.core.engine.backend import Backend, Capability, Cost, Effect, Probe, Support
    from orla_lg.core.guard.policies import AccessPolicy
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
        WarmSplit,
    )
    from orla_lg.core.operation.statistics import Statistics
    from orla_lg.core.placement.view import BackendView
    from orla_lg.core.prefetch.book import WarmUp
    from orla_lg.core.queues import Queued, RequestPolicy, StagePolicy
    from orla_lg.core.record import CallEvent, Happening, Record
    from orla_lg.errors import (
        AccessDenied,
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
        ThreadBusy,
        ThreadLost,
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
    "AccessDenied",
    "AccessPolicy",
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
    "ThreadBusy",
    "ThreadLost",
    "Upstream",
    "Usage",
    "Verb",
    "WarmNextStage",
    "WarmReturns",
    "WarmSplit",
    "WarmUp",
    "Workflow",
    "WorkflowError",
]

_HOMES = {
    "core.call": "Ask Assignment Call Chunk Considered Hints Usage",
    "core.engine.backend": "Backend Capability Cost Effect Probe Support",
    "core.guard.policies": "AccessPolicy",
    "core.accounting.costs": "Costs Spent",
    "core.limits.limits": "Limit Limits",
    "core.lookahead.estimates": "Learned",
    "core.lookahead.forecast": "Ahead StageOutlook",
    "core.mapping": "Planned StageMapper",
    "core.memory.events": "CacheAction CacheEvent EventKind Holding MemoryPolicy Returns Verb",
    "core.memory.policies": (
        "DemoteInterrupted FlushAtBoundary FlushPerRequest FlushUnderPressure Joined PreserveIncrements "
        "ReleaseAtSwitch ReleaseOnly WarmNextStage WarmReturns WarmSplit"
    ),
    "core.operation.statistics": "Statistics",
    "core.placement.view": "BackendView",
    "core.prefetch.book": "WarmUp",
    "core.queues": "Queued RequestPolicy StagePolicy",
    "core.record": "CallEvent Happening Record",
    "errors": (
        "AccessDenied BackendUnavailable BudgetExceeded CallRefused ConfigError DeadlineExceeded EngineError "
        "MappingError OrlaClosed OrlaError PolicyError QueueFull RecordUnknown StageError ThreadBusy "
        "ThreadLost WorkflowError"
    ),
    "graph.chat_model": "ChatOrla",
    "graph.saver": "OrlaSaver",
    "graph.stage_tree": "StageTree",
    "mappers.table": "ExplicitMapper",
    "orla": "Current Orla",
    "workflow": "Stage StageResult Upstream Workflow",
}
"""Where the public names are made, by module."""


if not TYPE_CHECKING:
    # Type checkers read the imports above; this would let them take any name for one of ours.
    from orla_lg.importing import lazily

    __getattr__, __dir__ = lazily(__name__, __all__, _HOMES)
