# ruff: noqa: F401
"""What benchmarks need of the inside of the core; nothing else in this folder imports ``orla_lg.core``."""

from __future__ import annotations

from orla_lg.core.background import Background
from orla_lg.core.cache.prefix.references import References
from orla_lg.core.cache.prefix.tree import CacheHandle, PrefixTree
from orla_lg.core.call import NO_HINTS, Ask, Assignment, Call, Hints, Usage
from orla_lg.core.engine.backend import Backend, Capability, Cost, Effect, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats, Scope, Warmed, WorkflowCache
from orla_lg.core.engine.speed import Speed
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import Send, arrive, serve
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.lookahead.structure import START, Edge, GraphStructure
from orla_lg.core.mapping import Consultation, Mapper, assign
from orla_lg.core.memory.events import Doing
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.memory.progress import GraphProgress
from orla_lg.core.operation.statistics import Statistics
from orla_lg.core.placement.candidates import SettledCandidates
from orla_lg.core.placement.view import BackendView
from orla_lg.core.policies import policies, policy
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.queues import Queued, Sortable
from orla_lg.core.record import CallEvent, Happening, Record
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Steps, Wait, WaitForTurn, drive
from orla_lg.core.workflow import Outcome, RunState
