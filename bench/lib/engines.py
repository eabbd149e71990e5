"""The real engine beside its chat API: its tokens, its pool, and its cache made empty."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Self

import httpx

from bench.pressure.workflows import Message, cuts
from orla_lg.openai_api.metrics import samples

FLUSH_TRIES, FLUSH_PAUSE_S = 20, 0.25
"""A call that ended a moment ago may still hold blocks, and vLLM then flushes nothing."""


class VLLM:
    """One vLLM server in its development mode.

    Raises:
        SystemExit: It does not answer, or not as this needs it.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        # Not through a proxy that the environment names: engines are near.
        self._http = httpx.Client(base_url=self.url.removesuffix("/v1"), timeout=60, trust_env=False)
        self.model = str(self._asked("GET", "/v1/models")["data"][0]["id"])
        pools = [labels for labels, _ in samples(self._http.get("/metrics").text, "vllm:cache_config_info")]
        if len(pools) != 1:
            raise SystemExit(f"{self.url} shows {len(pools)} KV caches in its metrics; a vLLM with one is needed")
        self.blocks, self.block_tokens = (int(pools[0][name]) for name in ("num_gpu_blocks", "block_size"))

    @property
    def has_plugin(self) -> bool:
        """Whether the engine can be told of workflows."""
        answer = self._http.post("/v1/orla/kv/stat", json={})
        return answer.is_success and answer.json().get("effect") == "stat"

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the tokens of a chat that asks for an answer."""
        return list(self._asked("POST", "/tokenize", messages=messages, add_generation_prompt=True)["tokens"])

    def split(self, text: str, sizes: Sequence[int]) -> list[str] | None:
        """Return consecutive pieces of *text* of so many tokens; ``None`` where it has fewer."""
        tokens = self._asked("POST", "/tokenize", prompt=text, add_special_tokens=False)["tokens"]
        if sum(sizes) > len(tokens):
            return None
        return [str(self._asked("POST", "/detokenize", tokens=tokens[a:b])["prompt"]) for a, b in cuts(sizes)]

    def empty_cache(self) -> None:
        """Forget every prefix, and see that the engine says so."""
        for _ in range(FLUSH_TRIES):
            answer = self._http.post("/reset_prefix_cache")
            if answer.is_success and answer.json().get("success") is True:
                return
            time.sleep(FLUSH_PAUSE_S)
        raise SystemExit(
            f"{self.url} did not empty its prefix cache (status {answer.status_code}: {answer.text[:200]!r}); "
            "start it with VLLM_SERVER_DEV_MODE=1 and let nobody else use it"
        )

    def _asked(self, method: str, path: str, **body: Any) -> dict[str, Any]:
        try:
            answer = self._http.request(method, path, json={"model": self.model, **body} if body else None)
            return dict(answer.raise_for_status().json())
        except (httpx.HTTPError, ValueError) as error:
            raise SystemExit(f"{self.url}: {method} {path}: {error}") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.close()
