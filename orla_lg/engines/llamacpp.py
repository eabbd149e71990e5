"""llama.cpp: its server inside the command's own process."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx

from orla_lg.engines.environment import Environment, InstallStep
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import SMOLLM2, EngineOptions, Place, Served
from orla_lg.errors import EngineError

__all__ = ["ENVIRONMENT", "LlamaCpp"]

ASK_TIMEOUT_S = 5.0

# Only for those who have not installed `orla-lg[demo]`, which holds the same.
ENVIRONMENT = Environment(
    name="llamacpp-2026.10.11549",
    steps=(InstallStep("llama.cpp in a wheel", (("xllamacpp==2026.10.11549",),)),),
    module="xllamacpp",
    size_mb=150,
    advice="Your pip or uv must reach an index that has xllamacpp; `pip install 'orla-lg[demo]'` does the same.",
)


class LlamaCpp:
    """Started in a second, with slots that can be saved and restored."""

    adapter = "llamacpp"
    ready_timeout_s = 120.0

    def prepare(self, options: EngineOptions, progress: Progress) -> EngineOptions:
        """Fetch what is missing; decide slots and context."""
        from orla_lg_llamacpp.model import download_progress, ensure_model

        if options.flags:
            raise EngineError(f"llamacpp takes no flags of its own; given were {' '.join(options.flags)}")
        if options.plugin:
            raise EngineError("llamacpp has no plugin and needs none: its slots are kept by workflow")
        if options.kv_events:
            raise EngineError("llamacpp publishes no cache events and needs none: its slots are ours to fill")
        slots, context_tokens = _shared_out(options)
        if importlib.util.find_spec("xllamacpp") is None:
            ENVIRONMENT.ensure(progress)
        if options.model == SMOLLM2:
            with download_progress() as report:
                ensure_model(report)
        elif not Path(options.model).expanduser().is_file():
            raise EngineError(f"the model {options.model} is neither {SMOLLM2!r} nor a GGUF file")
        return options.settled(slots=slots, context_tokens=context_tokens)

    @contextlib.contextmanager
    def serve(self, options: EngineOptions, place: Place) -> Iterator[Served]:
        """Run the server in this process."""
        from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
        from orla_lg_llamacpp.model import ensure_model

        if importlib.util.find_spec("xllamacpp") is None:
            sys.path.append(str(ENVIRONMENT.packages))  # of the same Python as ours
        slots, context_tokens = _shared_out(options)
        settings = EngineSettings(
            slots=slots,
            context_tokens=context_tokens,
            threads=options.threads,
            port=place.port,
            name=options.name or SMOLLM2,
            model_path=ensure_model() if options.model == SMOLLM2 else Path(options.model),
            log_errors=True,
        )
        with EmbeddedEngine(settings):
            yield Served(os.getpid(), group=0, poll=lambda: None)

    def phase(self, said: str) -> str:
        """Say what it is doing: it does but one thing."""
        return "loading the model"

    def load(self, root: str) -> str:
        """Say how many slots are busy."""
        # Not through a proxy that the environment names: this is a loopback address.
        slots = httpx.get(f"{root}/slots", timeout=ASK_TIMEOUT_S, trust_env=False).raise_for_status().json()
        return f"{sum(slot['is_processing'] for slot in slots)} of {len(slots)} slots busy"


def _shared_out(options: EngineOptions) -> tuple[int, int]:
    """Return slots and context tokens, whose product is what the KV cache holds."""
    slots, context_tokens, total = options.slots, options.context_tokens, options.kv_tokens
    if total is None:
        return slots or 4, context_tokens or 4096
    if slots and context_tokens and slots * context_tokens != total:
        raise EngineError(
            f"{slots} slots of {context_tokens} tokens are {slots * context_tokens}, not the {total} of kv_tokens; "
            "leave one of the three out"
        )
    slots = slots or (total // context_tokens if context_tokens else 4)
    context_tokens = context_tokens or total // slots
    if not slots or not context_tokens:
        raise EngineError(f"kv_tokens is {total}, too few for a single request of the size asked for")
    return slots, context_tokens
