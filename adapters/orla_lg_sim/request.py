"""What goes into the simulated engine and what comes out of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from orla_lg_sim.blocks import Hash


@dataclass(frozen=True, slots=True)
class SimRequest:
    """One call, as far as its timing goes: lengths and what its prefix shares with others."""

    id: str
    prompt_tokens: int
    output_tokens: int
    """How many tokens it will generate: the engine's clairvoyance, nothing of it is used for scheduling."""
    hashes: Sequence[Hash] = field(default=(), repr=False)
    """Of its full blocks, from the first token on, and past the prompt where a follow-up may send the answer
    back; blocks beyond these take room but are never found by anybody."""
    priority: int = 0
    """Lower runs first, if the engine heeds it."""
    workflow: str | None = None
    """Who owns the blocks, for an engine whose cache is told what to keep."""
    watched: bool = False
    """Every token is an event of its own, not only the first and the last."""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(f"request {self.id!r} needs a prompt and an answer of at least one token each")


class Kind(StrEnum):
    """What happened to a request."""

    FIRST_TOKEN = "first_token"
    TOKEN = "token"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Event(NamedTuple):
    """Something that happened to a request."""

    kind: Kind
    id: str
    at_s: float
    """On the engine's clock."""
    tokens: int
    """Generated so far."""
    prompt_tokens: int
    cached_tokens: int
    """Prompt tokens found in the KV cache when the request was first scheduled."""
    preemptions: int
    """How often it has lost its blocks."""


@dataclass(frozen=True, slots=True)
class EngineState:
    """The engine's load and what it has counted, at one moment."""

    running: int
    waiting: int
    kv_usage: float
    """The part of the pool that running sequences hold, 0 to 1."""
    prefix_queries: int
    """Prompt tokens looked up in the cache."""
    prefix_hits: int
    preemptions: int
    steps: int
    finished: int
    evictions: int
