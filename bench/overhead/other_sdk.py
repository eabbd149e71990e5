"""``ChatOpenAI`` by an SDK that is met at its HTTP client only, as Groq's or Anthropic's; bytes pass as they are."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import openai
from langchain_openai import ChatOpenAI

from bench.lib.stub import Way
from orla_lg.clients import patching
from orla_lg.clients.table import Client


class OtherSDK(openai.OpenAI):
    """An SDK of the same make whose chat completions have no faster way in."""

    request = openai.OpenAI.request


class AsyncOtherSDK(openai.AsyncOpenAI):
    """``OtherSDK`` for a running loop."""

    request = openai.AsyncOpenAI.request


CLIENT = Client("other", __name__, ("OtherSDK.request", "AsyncOtherSDK.request"), "stainless", ("chat",))


def way(url: str, wrap: Callable[[Any], Any]) -> Way:
    """Return the way of its calls to the engine at *url*."""
    patching.patch(CLIENT, sys.modules[__name__])
    made: dict[str, Any] = {"base_url": url, "api_key": "any"}
    sync, asynchronous = OtherSDK(**made, timeout=None), AsyncOtherSDK(**made, timeout=None)
    model = ChatOpenAI(
        model="stub-model",
        root_client=sync,
        client=sync.chat.completions,
        root_async_client=asynchronous,
        async_client=asynchronous.chat.completions,
    )
    return Way("other SDK", model, wrap)
