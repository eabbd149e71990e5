"""The engines: llama.cpp or vLLM, with room for all cases at once, or short of it."""

from __future__ import annotations

from dataclasses import dataclass

from bench.lib.engines import LLAMACPP, VLLM_CPU
from orla_lg.engines import EngineOptions

CONTEXT_TOKENS = 1536
"""A case's last prompt and answer have some 1,050."""

BLOCK_TOKENS = 32
SHORT, ROOM = "short", "room"


@dataclass(frozen=True)
class Place:
    """An engine with a KV cache of a size."""

    engine: str
    pool: str
    holds: int
    """llama.cpp: slots; vLLM: blocks of 32 tokens."""
    every_s: float
    """Between two arrivals, on the mean: about as long as the engine needs for a case."""

    @property
    def block_tokens(self) -> int:
        """What is cached together or not at all: on llama.cpp each token is for itself."""
        return 1 if self.engine == LLAMACPP else BLOCK_TOKENS

    @property
    def name(self) -> str:
        return f"{self.engine}-{self.pool}"

    @property
    def title(self) -> str:
        """What it is, for tables and drawings."""
        if self.engine == LLAMACPP:
            return f"llama.cpp, {self.holds} slots"
        return f"vLLM, {self.holds * BLOCK_TOKENS:,} tokens"


PLACES = (
    Place(LLAMACPP, SHORT, holds=3, every_s=4.0),
    Place(LLAMACPP, ROOM, holds=8, every_s=4.0),
    Place(VLLM_CPU, SHORT, holds=64, every_s=1.2),
    Place(VLLM_CPU, ROOM, holds=240, every_s=1.2),
)


def options_of(place: Place) -> EngineOptions:
    """Return how the engine of a place is started."""
    if place.engine == LLAMACPP:
        return EngineOptions("llamacpp", slots=place.holds, context_tokens=CONTEXT_TOKENS)
    kv_tokens = place.holds * BLOCK_TOKENS
    return EngineOptions("vllm-cpu", kv_tokens=kv_tokens, context_tokens=CONTEXT_TOKENS, plugin=True)
