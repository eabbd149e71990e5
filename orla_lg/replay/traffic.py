"""What a file says of traffic: calls by their records, their prompts as pieces, the settings they were served in.

Nothing is sized by a number that stands in a file: counts are bounded where they are read, and a prompt is a chain of
nodes that calls share.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

MOST_TOKENS = 2_000_000
"""Of a call's prompt, and of its answer; what says more is broken."""

MOST_CHARS = 100_000_000
"""Of a piece of a prompt."""

MOST_SECONDS = 10_000_000.0
"""Of a wait, a call or a file: four months."""

MOST_PIECES = 20_000
"""Of a prompt; a longer one is taken as one piece."""

MOST_BACKENDS = 100


@dataclass(eq=False, slots=True)
class Piece:
    """The beginning of a prompt up to the end of one message; calls whose prompts begin alike share it."""

    name: int
    """Equal for equal beginnings."""
    chars: int
    """Of this message alone."""
    before: Piece | None
    is_answer: bool
    depth: int
    until_chars: int
    """Of the whole beginning."""
    until_tokens: int = 0
    """Of the whole beginning; 0 until the first call with it is looked at (``prompts``)."""

    @classmethod
    def after(cls, before: Piece | None, name: int, chars: int, *, is_answer: bool = False) -> Piece:
        """Return the piece that follows on another one."""
        depth, until = (0, 0) if before is None else (before.depth, before.until_chars)
        return cls(name, chars, before, is_answer, depth + 1, until + chars)


@dataclass(frozen=True, slots=True)
class RecordedCall:
    """One call as its record has it; times in seconds on one clock for the whole file."""

    id: str
    workflow: str
    """With its tenant: what shares KV cache."""
    run: str | None
    stage: str
    backend: str | None
    arrived_s: float
    duration_s: float
    queue_wait_s: float = 0.0
    ttft_s: float | None = None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    priority: float = 0.0
    tenant: str | None = None
    cache_hint: str | None = None
    cost_usd: float | None = None
    error: str | None = None
    external: bool = False
    step: int | None = None
    prompt: Piece | None = field(default=None, repr=False)
    """``None`` where the file does not have it."""
    max_tokens: int | None = None
    deadline_s: float | None = None
    graph: str = ""
    run_arrived_s: float | None = None

    @property
    def is_counted(self) -> bool:
        """Whether it ran on an engine of ours that counted its tokens, so that it can be simulated."""
        counted = bool(self.prompt_tokens) and bool(self.completion_tokens)
        return counted and self.backend is not None and self.error is None and not self.external

    @property
    def ended_s(self) -> float:
        """When its last token came."""
        return self.arrived_s + self.duration_s

    @property
    def dispatched_s(self) -> float:
        """When it went to its engine."""
        return self.arrived_s + self.queue_wait_s

    @property
    def first_s(self) -> float | None:
        """When its first token came; ``None`` where that was not seen."""
        return None if self.ttft_s is None else self.dispatched_s + self.ttft_s


@dataclass(frozen=True, slots=True)
class BackendSetting:
    """A backend as its records say it was set up; ``None``: they do not."""

    name: str
    engine: str = ""
    max_concurrency: int | None = None
    capacity: int = 10_000
    kv_tokens: int | None = None
    """As the engine told the core, which admits calls by it."""
    context_tokens: int | None = None
    slots: int | None = None
    stage_policy: str = "workflow_fcfs"
    request_policy: Mapping[str, str] = field(default_factory=lambda: {"*": "workflow_fcfs"})
    prices: tuple[float, float, float | None] | None = None
    can: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class RecordedSetting:
    """What calls were served in."""

    backends: Mapping[str, BackendSetting] = field(default_factory=dict)
    admission: bool = True
    memory: str = "default"


@dataclass(slots=True)
class RecordedTraffic:
    """What a file holds."""

    source: str
    calls: list[RecordedCall] = field(default_factory=list)
    """By arrival."""
    setting: RecordedSetting | None = None
    """``None`` where the file does not say."""
    settings: int = 0
    """How many different ones it names; replayed is the last."""
    faults: list[str] = field(default_factory=list)
    """Of lines that could not be read: which, and what was wrong; the first few."""
    broken: int = 0
    """How many there are."""
    without_shape: int = 0
    """Calls whose record has neither their arrival nor their prompt: of an older version, or written in haste."""
    lost_beginnings: int = 0
    """Calls whose prompt begins with pieces that stand in no line of the file."""
    happened: bool = True
    """Whether the file says what happened; a trace of arrivals alone does not."""

    def fault(self, line: int, what: str, most: int = 5) -> None:
        """Note a line that could not be read."""
        self.broken += 1
        if len(self.faults) < most:
            self.faults.append(f"line {line} {what}")
