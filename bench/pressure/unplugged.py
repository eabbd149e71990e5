"""One engine for all arms: for those without the plugin it is as if the plugin were not there.

Two engines would share the cores, or be measured at different times. One is fair because the plugin evicts least
recently used first, as vLLM does, as long as calls carry no owner.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import httpx

from orla_lg.errors import EngineRefused
from orla_lg.openai_api.adapter import TIMEOUT_S
from orla_lg_vllm import VLLMAdapter

PLUGIN_ROUTES = "orla/kv/"


class Unplugged(VLLMAdapter):
    """vLLM's adapter before an engine without the plugin: it gets no answer from its routes."""

    async def ask(
        self, method: str, path: str, body: Mapping[str, Any] | None = None, *, timeout_s: float = TIMEOUT_S
    ) -> httpx.Response:
        """Send one short request, unless it is for the plugin."""
        if PLUGIN_ROUTES in path:
            raise EngineRefused(f"{path} is not there for this arm", status=404)
        return await super().ask(method, path, body, timeout_s=timeout_s)


@contextlib.contextmanager
def plugin(*, seen: bool) -> Iterator[None]:
    """Let an ``Orla`` that is made meanwhile see the engine's plugin, or not."""
    with contextlib.nullcontext() if seen else mock.patch("orla_lg.orla.adapter_of", Unplugged):
        yield
