"""The same graph on a stub engine, bare and through orla_lg."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from langchain_openai import ChatOpenAI

from bench.lib.engines import started
from orla_lg import Backend, ChatOrla, Orla


class Way(NamedTuple):
    """How calls go to the stub."""

    name: str
    model: Any
    wrap: Callable[[Any], Any]


@contextmanager
def ways(*options: str, **backend: Any) -> Iterator[list[Way]]:
    """Start the stub, which is a process of its own, and give the ways to it: plain, wrapped, and by ``ChatOrla``."""
    with (
        started("tests.stub_engine", *options) as url,
        Orla([Backend("main", url, model="stub-model", **backend)], {"*": "main"}, keep_records=1000) as orla,
    ):
        plain = {"model": "stub-model", "base_url": url, "api_key": "any"}
        yield [
            Way("bare", ChatOpenAI(**plain), lambda graph: graph),
            Way("wrapped", ChatOpenAI(**plain), orla.wrap),
            Way("ChatOrla", ChatOrla(orla=orla, model="main"), lambda graph: graph),
        ]
