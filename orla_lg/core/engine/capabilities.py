"""What only some engines can: small Protocols that an adapter may have besides ``BackendAdapter``.

An adapter that has the method may still answer ``Effect.UNSUPPORTED``: whether the engine behind it can is in
its ``Probe``. None of these raises for what an engine cannot do; each says what really happened.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Effect


@dataclass(frozen=True, slots=True)
class WorkflowCache:
    """What one workflow holds, and nothing that another holds too."""

    workflow: str
    slot: int | None = None
    """Its slot, on engines with slots."""


@dataclass(frozen=True, slots=True)
class PrefixCache:
    """What a request that begins like this one would find."""

    body: Mapping[str, Any] = field(repr=False)
    """A chat completion's: ``model``, ``messages``, ``tools``."""


@dataclass(frozen=True, slots=True)
class WholeCache:
    """Everything that no running request needs."""


Scope = WorkflowCache | PrefixCache | WholeCache
"""Which part of an engine's KV cache. An adapter never widens it."""


@runtime_checkable
class KVControl(Protocol):
    """The engine takes orders about what its cache keeps."""

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Keep *scope* before all else, for *ttl_s* seconds or until it is released."""
        ...

    async def release(self, scope: Scope) -> Effect:
        """Let *scope* be the first to be evicted."""
        ...

    async def flush(self, scope: Scope) -> Effect:
        """Forget *scope* now."""
        ...


@dataclass(frozen=True, slots=True)
class Copied:
    """What came of a slot's copy to the engine's disk."""

    effect: Effect
    tokens: int | None = None
    """As many as the slot held; ``None`` where the engine does not say."""


@runtime_checkable
class SlotStore(Protocol):
    """The engine's cache lies in numbered slots, each with one owner at a time."""

    async def erase(self, slot: int) -> Effect:
        """Forget what the slot holds."""
        ...

    async def save(self, slot: int, name: str) -> Copied:
        """Copy what the slot holds to the engine's disk under *name*."""
        ...

    async def restore(self, slot: int, name: str) -> Effect:
        """Fill the slot with what was saved under *name*; whatever it held is gone."""
        ...


@dataclass(frozen=True, slots=True)
class Warmed:
    """What came of a warm-up."""

    effect: Effect
    usage: Usage = field(default_factory=Usage)
    """What it cost: prompt tokens less cached tokens were computed."""


@runtime_checkable
class Warmable(Protocol):
    """A prompt can be prefilled before a call waits for the answer."""

    async def warm(self, body: Mapping[str, Any]) -> Warmed:
        """Prefill the prompt of a chat completion; cancelling this ends it on the engine too."""
        ...


@runtime_checkable
class Lingering(Protocol):
    """The engine drops a model, cache and all, that was not used for a while, and takes orders how long it stays."""

    async def linger(self, keep_s: float) -> Effect | None:
        """Let the model stay for *keep_s* more seconds, for a call that just ended.

        ``PINNED`` if the engine had to be asked and took it, ``None`` if its last order will do. The model stays, no
        more: its cache may still make room for other requests.
        """
        ...


@dataclass(frozen=True, slots=True)
class EngineStats:
    """An engine's load at one moment; ``None`` where it does not say."""

    running: int | None = None
    waiting: int | None = None
    kv_usage: float | None = None
    """The part of the KV cache that running requests hold, 0 to 1."""
    kv_tokens: int | None = None
    """What the whole KV cache holds, in tokens."""
    prefix_queries: int | None = None
    """Prompt tokens looked up in the prefix cache since the engine started."""
    prefix_hits: int | None = None
    """How many of them were found."""
    preemptions: int | None = None


@runtime_checkable
class Observable(Protocol):
    """The engine reports its load."""

    async def stats(self) -> EngineStats:
        """Ask for it.

        Raises:
            BackendUnavailable: The engine does not answer.
        """
        ...


@dataclass(frozen=True, slots=True)
class BlocksStored:
    """The engine computed blocks that follow each other, and keeps them."""

    hashes: Sequence[Hashable]
    parent: Hashable | None
    """Of the block before them; ``None``: they begin a prompt."""
    block_tokens: int
    workflow: str | None
    """The call's workflow, if its request had a label."""


@dataclass(frozen=True, slots=True)
class BlocksRemoved:
    """The engine gave up blocks; of several with the same hash, one each time."""

    hashes: Sequence[Hashable]


@dataclass(frozen=True, slots=True)
class BlocksCleared:
    """The engine gave up everything, or what it holds is not known any more."""

    missed: bool = False
    """Events were lost on the way, and cannot be had again."""


KVEvent = BlocksStored | BlocksRemoved | BlocksCleared


@runtime_checkable
class KVEventSource(Protocol):
    """The engine reports what its prefix cache takes up and gives up, block by block."""

    def kv_events(self) -> AsyncGenerator[Sequence[KVEvent]] | None:
        """Return its reports from now on, in its order; ``None`` where that was not switched on.

        It ends when it is closed, and only then: an engine that is gone may come back.
        """
        ...


@runtime_checkable
class Tokenizing(Protocol):
    """The engine tokenizes prompts."""

    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        """Return the token ids of a chat completion's prompt, its template included.

        Raises:
            BackendUnavailable: The engine does not answer.
            EngineRefused: It will not, or cannot as it was started.
        """
        ...


@runtime_checkable
class Abortable(Protocol):
    """A request can be ended by its call's id, without its connection."""

    async def abort(self, call_id: str) -> bool:
        """End a call's request; returns whether the engine took the order."""
        ...


@runtime_checkable
class Sleepable(Protocol):
    """The model can leave memory and come back."""

    async def sleep(self) -> Effect:
        """Free the engine's memory; its KV cache goes with it."""
        ...

    async def wake(self) -> Effect:
        """Load the model again; ``RESTORED`` when it serves, with an empty cache."""
        ...
