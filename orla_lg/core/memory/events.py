"""What happens to a workflow's cache, and what the memory manager may be asked for.

Things happen (``CacheEvent``), a policy says what should be done about them (``CacheAction``), the engine's adapter
does it and says what came of it (``Effect``), and ``cached_tokens`` of the workflow's next call verify that.
Keeping is doing nothing. A workflow's flush is never widened to a flush of everything. Policies are in
``policies``, what an engine is believed to hold in ``core.cache``, and ``manager`` joins them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol

from orla_lg.core.call import CacheHint


class EventKind(StrEnum):
    """What may happen to a workflow that its cache should know of."""

    CALL_DONE = "call_done"
    """A call of a workflow ended; if none is open, the workflow now waits for something (``returns``)."""
    STRAY_DONE = "stray_done"
    """A call of no workflow we follow ended."""
    STAGE_BUSY = "stage_busy"
    """A call of a stage went to its engine, or a stage began that makes none; ``ahead`` says what comes next."""
    TOOL_STARTED = "tool_started"
    """A tool runs (``tool``); ``returns`` says for how long such tools run."""
    TOOL_ENDED = "tool_ended"
    """Of the tools that a call (``call``) asked for some ended, or have a part of their result, and others still run
    (``running``): more of the next prompt is certain. ``returns`` says when the last usually ends. It is signalled
    only where prompts are split (``wrap(split_prompts=True)``)."""
    SWITCHED = "switched"
    """The workflow has no more calls on ``backend`` and now calls another one."""
    PRESSURE = "pressure"
    """``needs_tokens`` more than ``backend`` holds are wanted there; ``holdings``: what workflows hold now."""
    INTERRUPTED = "interrupted"
    RESUMED = "resumed"
    """A run starts on a thread that was idle or interrupted."""
    IDLE = "idle"
    """The last run on a thread ended; the user may write again."""
    OVER = "over"
    """The last run of a workflow without a thread ended."""
    THREAD_DELETED = "thread_deleted"
    FORGOTTEN = "forgotten"
    """More threads lie idle than we remember; this was the oldest."""


FINAL = frozenset({EventKind.OVER, EventKind.THREAD_DELETED, EventKind.FORGOTTEN})
"""After these a workflow will not come back."""


@dataclass(frozen=True, slots=True)
class Returns:
    """What is known of when a workflow calls again that waits for something."""

    chance: float = 1.0
    """That it does at all, 0 to 1."""
    usual_s: float | None = None
    """Seconds after which half of those that do have; ``None``: not known."""
    late_s: float | None = None
    """Seconds after which nine in ten have."""


@dataclass(frozen=True, slots=True)
class CacheEvent:
    """Something that happened to a workflow."""

    kind: EventKind
    workflow: str
    backend: str | None = None
    """``None`` concerns every backend that holds something of the workflow."""
    hint: CacheHint | None = None
    graph: str = ""
    stage: str = ""
    """The stage of the call that is done, or that asked for tools which end; or of the tool that starts."""
    waits: bool = False
    """No call of the workflow is open now, but its run is."""
    returns: Returns | None = None
    """When a workflow that waits usually calls again."""
    prompt_tokens: int = 0
    """The length of the prompt of the call that is done."""
    fresh_tokens: int = 0
    """So much of that prompt was not found in the cache."""
    tool: str = ""
    call: str = ""
    """The id of the call that asked for the tools that end."""
    running: Sequence[tuple[str, float]] = ()
    """Its tools that did not end yet, in the order of their calls: by name, and for how many seconds each runs (0: it
    is to begin)."""
    at_once: int = 0
    """How many of them run beside each other, as far as was seen: 1 where a node runs its tools one after the other;
    0: all of them."""
    needs_tokens: int = 0
    holdings: Sequence[Holding] = ()
    ahead: Mapping[tuple[str, str], float] = field(default_factory=dict)
    """By stage and backend of the next calls after the present ones, how likely each is."""

    @property
    def final(self) -> bool:
        """Whether the workflow will not come back."""
        return self.kind in FINAL


class Doing(StrEnum):
    """What a workflow with cache on a backend does, or waits for."""

    GENERATING = "generating"
    """A call of it is under way there, or waits."""
    TOOL = "tool"
    """It runs, without a call there: a tool, its own code, a call elsewhere."""
    HUMAN = "human"
    """It was interrupted and waits for a human's answer."""
    IDLE = "idle"
    """No run of it is open."""


@dataclass(frozen=True, slots=True)
class Holding:
    """What a workflow has in the cache at one moment, as we believe."""

    workflow: str
    tokens: int
    """On the paths of its stages' newest calls."""
    alone_tokens: int
    """Of these, on no other workflow's; what a flush of the workflow frees."""
    obsolete_tokens: int
    """Besides, what its earlier calls left and no workflow's newest call contains."""
    doing: Doing
    since_s: float
    """Monotonic seconds."""
    chance: float = 1.0
    """That the workflow calls again, 0 to 1."""

    @property
    def loss_tokens(self) -> float:
        """What is expected to be computed again if it went now."""
        return self.chance * self.alone_tokens

    @property
    def shared_tokens(self) -> int:
        """What other workflows have on their paths too."""
        return self.tokens - self.alone_tokens


class Verb(StrEnum):
    """What may be asked for. What each means (which is the stronger, what an engine is asked) is in ``verbs``."""

    WARM = "warm"
    """What is certain of the workflow's next prompt is prefilled, if that costs other calls nothing."""
    PIN = "pin"
    """The contents stay, for ``ttl_s`` seconds at most."""
    RELEASE = "release"
    """Other workflows may take the slot or blocks; the contents stay until they do."""
    FLUSH = "flush"
    """The contents go."""
    SAVE = "save"
    """A slot's contents are copied to the engine's disk; our own order, no policy's."""
    RESTORE = "restore"
    """A slot is filled with what was saved; likewise."""


@dataclass(frozen=True, slots=True)
class CacheAction:
    """What is to be done with a workflow's cache on a backend (``None``: on all that hold some)."""

    verb: Verb
    workflow: str
    backend: str | None = None
    ttl_s: float | None = None
    """For how long to pin."""
    after_s: float = 0.0
    """Wait so long first, in seconds; if the workflow calls or ends before, nothing is done."""
    graph: str = ""
    stage: str = ""
    """Warm what this stage's prompts begin with; empty: the workflow's own last prompt."""
    next_of: str = ""
    """The id of a call of this stage: warm what is certain of the stage's prompt after that call, its answer and the
    results of tools included."""
    chance: float = 1.0
    """That the call comes which is warmed for, 0 to 1."""
    within_s: float | None = None
    """When that call is expected, in seconds from when the order is carried out; ``None``: not known."""


@dataclass(frozen=True, slots=True)
class SplitPrompt:
    """What is certain of the prompt that follows on a call's answer, while tools still run."""

    call: str
    """The id of the call that asked for the tools."""
    workflow: str
    backend: str
    stage: tuple[str, str]
    """Graph and stage of the call."""
    messages: Sequence[Any] = field(repr=False)
    """What follows on the call's own messages: its answer, and results of tools in the order of the calls."""
    results: int = 0
    """How many results are among them, one that is there in part included; without any it is not warmed."""
    running: Sequence[tuple[str, float]] = ()
    """As in ``CacheEvent``."""
    partly: bool = False
    """The last message goes on."""
    at_once: int = 0
    """As in ``CacheEvent``."""


class MemoryPolicy(Protocol):
    """Decides what to do with caches; keeping is doing nothing."""

    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:
        """Return what is to be done after *event*."""
        ...
