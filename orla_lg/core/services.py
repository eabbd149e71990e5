"""What a call in flight needs of its core, which ``serving`` makes and joins."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from orla_lg.core.accounting.tracing import CallTracer
from orla_lg.core.background import Background, Clock
from orla_lg.core.boundary.masking import Masking
from orla_lg.core.engine.retry import RetryPolicy
from orla_lg.core.guard.guard import Guard
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.lookahead.lookahead import Lookahead
from orla_lg.core.mapping import Mappings
from orla_lg.core.memory.manager import MemoryManager
from orla_lg.core.memory.progress import GraphProgress
from orla_lg.core.operation.backends import Schedulers
from orla_lg.core.operation.unread_hints import UnreadHints
from orla_lg.core.record import RecordBook
from orla_lg.core.steps import Pauses
from orla_lg.core.workflow import WorkflowBook


@dataclass(eq=False, slots=True)
class Services:
    """What a call in flight needs of its core."""

    clock: Clock
    background: Background
    new_id: Callable[[], str]
    book: WorkflowBook
    records: RecordBook
    limits: LimitBook
    lookahead: Lookahead
    memory: MemoryManager
    progress: GraphProgress
    schedulers: Schedulers
    """The backends' schedulers, in the order of the configuration."""
    mappings: Mappings
    masking: Masking
    """Takes keys out of what is recorded."""
    unread_hints: UnreadHints
    retries: RetryPolicy = field(default_factory=RetryPolicy)
    pauses: Pauses = field(default_factory=Pauses)
    guard: Guard | None = None
    """``None`` without policies and labels."""
    closed: bool = False
    tracer: CallTracer | None = None
    """Follows each call in its caller's trace."""
    unplaced: set[str] = field(default_factory=set)
    """Models of calls that went past the core, as far as a warning said so."""
