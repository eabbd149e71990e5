"""Where the desk runs: llama.cpp or vLLM, with room for all cases at once, or short of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import httpx

from bench.lib.engines import VLLM
from orla_lg.engines import EngineOptions, running_engine

CONTEXT_TOKENS = 1536
"""A case's last prompt and answer have some 1,050."""

BLOCK_TOKENS = 32
LLAMACPP, VLLM_CPU = "llamacpp", "vllm"
SHORT, ROOM = "short", "room"


class Engine(Protocol):
    """What a turn needs of an engine beside its chat API."""

    url: str
    model: str
    block_tokens: int
    """What is cached together or not at all."""

    @property
    def has_plugin(self) -> bool:
        """Whether it can be told of workflows, where that takes a plugin."""
        ...

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of a chat that asks for an answer."""
        ...

    def empty_cache(self) -> None:
        """Forget every prefix."""
        ...


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


@contextlib.contextmanager
def engine_at(place: Place, url: str | None = None) -> Iterator[Engine]:
    """Give the engine of a place: started here and ended afterwards, or one that runs already.

    Raises:
        SystemExit: The engine does not answer, or not as this needs it.
    """
    with contextlib.ExitStack() as stack:
        if url is None:
            url = stack.enter_context(running_engine(options_of(place))).url
        yield stack.enter_context(Llama(url) if place.engine == LLAMACPP else VLLM(url))


def options_of(place: Place) -> EngineOptions:
    """Return how the engine of a place is started."""
    if place.engine == LLAMACPP:
        return EngineOptions("llamacpp", slots=place.holds, context_tokens=CONTEXT_TOKENS)
    kv_tokens = place.holds * BLOCK_TOKENS
    return EngineOptions("vllm-cpu", kv_tokens=kv_tokens, context_tokens=CONTEXT_TOKENS, plugin=True)


class Llama:
    """llama.cpp's server beside its chat API.

    Raises:
        SystemExit: It does not answer.
    """

    block_tokens = 1
    has_plugin = True  # its slots are all that it takes

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        # Not through a proxy that the environment names: engines are near.
        self._http = httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=60, trust_env=False)
        self.model = str(self._asked("GET", "/v1/models")["data"][0]["id"])
        self.slots = int(self._asked("GET", "/props")["total_slots"])

    def prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Return the tokens of a chat that asks for an answer."""
        text = self._asked("POST", "/apply-template", messages=list(messages))["prompt"]
        return list(self._asked("POST", "/tokenize", content=text, add_special=True, parse_special=True)["tokens"])

    def empty_cache(self) -> None:
        """Erase every slot."""
        for slot in range(self.slots):
            self._asked("POST", f"/slots/{slot}?action=erase")

    def _asked(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json=body if method == "POST" else None)
            return dict(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError) as error:
            raise SystemExit(f"{self.url}: {method} {path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()
