"""What the tests of Ollama's clients share: a model that answers by rule, and servers of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from orla_lg import Backend
from tests.wire.answers import text_of, value_for
from tests.wire.machine import Machine
from tests.wire.ollama_native import Said, Script
from tests.wire.ollama_server import OllamaFlags, OllamaServer

THEIRS = "qwen3:8b"
"""The model that the code names."""
OURS = "ours:70b"
"""The backend's."""


def model(asked: dict[str, Any]) -> Said:
    """Answer by rule, so that the same request gets the same answer on each wire."""
    messages, form, tools = asked["messages"], asked.get("response_format") or {}, asked.get("tools") or []
    last = messages[-1]
    thinking = "let me see" if asked.get("reasoning_effort") not in (None, "none") else ""
    if form.get("type") == "json_schema":
        return Said(json.dumps(value_for(form["json_schema"]["schema"])), thinking)
    if form.get("type") == "json_object":
        return Said('{"binary_score": "yes", "query": "stones"}', thinking)
    if tools and last["role"] != "tool":
        functions = [tool["function"] for tool in tools]
        return Said(
            thinking=thinking, calls=tuple((each["name"], value_for(each["parameters"])) for each in functions)
        )
    told = " and ".join(text_of(message) for message in messages if message["role"] == last["role"])
    return Said(f"{len(messages)} {last['role']} said: {told}", thinking)


@contextmanager
def served(name: str = THEIRS, *, native: bool = True, script: Script = model) -> Iterator[OllamaServer]:
    """Run a server of a model under *name*; one that is not native speaks chat completions alone."""
    flags = OllamaFlags(native=native, names=(name,), capabilities=("completion", "tools", "thinking", "vision"))
    machine = Machine(running=8, block=1, blocks=4096, token_s=0.0)
    with OllamaServer(flags, machine, script) as server:
        yield server


def backend(server: OllamaServer, name: str = "main", **more: Any) -> Backend:
    """Return the backend at a server of ``OURS``."""
    engine = "ollama" if server.flags.native else "openai"
    return Backend(name, server.url, **{"model": OURS, "engine": engine, **more})


OF_ITS_OWN = frozenset({
    "created_at", "total_duration", "load_duration", "prompt_eval_duration", "eval_duration", "id", "run_id",
    "model", "model_name", "prompt_eval_cached_count", "lc_run_id",
})  # fmt: skip
"""Fields that differ from call to call, or say the model's name."""


def plain(said: Any) -> Any:
    """Return an answer as plain data, without what each call has of its own."""
    if hasattr(said, "model_dump"):
        said = said.model_dump()
    if isinstance(said, dict):
        return {key: plain(value) for key, value in said.items() if key not in OF_ITS_OWN}
    if isinstance(said, list | tuple):
        return [plain(each) for each in said]
    return said
