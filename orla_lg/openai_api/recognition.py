"""Which engine answers at a URL: each leaves its mark on the list of its models."""

from __future__ import annotations

from collections.abc import Mapping

from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.adapter import OpenAIAdapter

ENGINES: Mapping[str, tuple[str, str]] = {
    "llamacpp": ("llamacpp", "llama.cpp"),
    "vllm": ("vllm", "vLLM"),
    "sglang": ("sglang", "SGLang"),
    "library": ("ollama", "Ollama"),
}
"""By ``owned_by`` of a model, the name of the engine's adapter, and its own. Other servers say other things there."""

TITLES: Mapping[str, str] = dict(ENGINES.values())
"""What engines are called, by the names of their adapters."""


async def engine_at(adapter: object) -> str | None:
    """Return the adapter's name of the engine that answers; ``None`` where its mark is not known."""
    if not isinstance(adapter, OpenAIAdapter):
        return None
    try:
        models = (await adapter.get("models")).get("data")
    except BackendUnavailable:
        return None
    owners = {entry.get("owned_by") for entry in models or () if isinstance(entry, dict)}
    known = {ENGINES[owner][0] for owner in owners if isinstance(owner, str) and owner in ENGINES}
    return known.pop() if len(known) == 1 else None
