"""The demo run: engines, one ``Orla``, one line that wraps the graph, and many tickets at once."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

from openai import OpenAIError

from orla_lg import Backend, Cost, Hints, Orla, OrlaError, Statistics
from orla_lg.demo.board import Board
from orla_lg.demo.fallbacks import Email
from orla_lg.demo.graph import chat_model, support_graph

LIGHT_COST = Cost(input_per_mtoken=0.05, output_per_mtoken=0.10, cached_input_per_mtoken=0.01)
HEAVY_COST = Cost(input_per_mtoken=0.20, output_per_mtoken=0.60, cached_input_per_mtoken=0.04)
"""What the two engines would cost if they were the paper's: the table then shows what mapping is for."""

SLOTS = {"light": 2, "heavy": 4}
THREADS = {"light": 1, "heavy": 1}
"""One core each: an engine whose threads share a core with another's spins at its barriers, many times slower."""
CONTEXT_TOKENS = 1536
"""Per slot; the longest talk about a ticket takes some 600."""

PROPS_PATIENCE_S = 2.0
SETTLE_PATIENCE_S = 2.0
"""How long to wait at the end until the engines have erased what was flushed."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one run of the demo does."""

    letters: Sequence[str]
    outbox: Path
    url: str | None = None
    """An engine of the user's own; ``None`` starts two embedded ones."""
    model: str | None = None
    engine: str | None = None
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class DemoResult:
    """How the run ended."""

    board: Board
    emails: Mapping[int, Email]
    interrupted: bool


Watch = Callable[[Board, Orla], AbstractContextManager[object]]


def priorities(stage: str, state: Any) -> Hints | None:
    """Let billing and technical tickets go before the others once they are classified, as in the paper."""
    found = state.get("classification")
    if found is None:
        return None
    return Hints(priority=8 if found.category in ("billing", "technical") else 5)


@contextmanager
def engines(plan: Plan) -> Iterator[list[Backend]]:
    """Start what serves the demo: the user's engine, or a light and a heavy one in this process."""
    with ExitStack() as stack:
        if plan.url:
            kind = plan.engine or engine_at(plan.url)
            yield [Backend("engine", plan.url, plan.model, kind, api_key=plan.api_key, cost=HEAVY_COST)]
        else:
            yield [stack.enter_context(embedded(name)) for name in ("light", "heavy")]


@contextmanager
def embedded(name: str) -> Iterator[Backend]:
    """Start one llama.cpp engine in this process.

    Raises:
        EngineError: The engine or its model could not be had.
    """
    from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

    cost = LIGHT_COST if name == "light" else HEAVY_COST
    settings = EngineSettings(slots=SLOTS[name], context_tokens=CONTEXT_TOKENS, threads=THREADS[name])
    with EmbeddedEngine(settings) as engine:
        yield Backend(name, engine.url, engine.name, "llamacpp", cost=cost)


def engine_at(url: str) -> str:
    """Return ``llamacpp`` if a llama.cpp server answers there, else ``openai``."""
    try:
        with urlopen(url.rstrip("/").removesuffix("/v1") + "/props", timeout=PROPS_PATIENCE_S) as answer:
            return "llamacpp" if b"total_slots" in answer.read() else "openai"
    except (URLError, OSError, ValueError):
        return "openai"


def run(plan: Plan, watch: Watch) -> DemoResult:
    """Answer all tickets, watched; Ctrl-C ends it cleanly with what there is.

    Raises:
        OrlaError: Nothing could be started.
    """
    plan.outbox.parent.mkdir(parents=True, exist_ok=True)
    emails: dict[int, Email] = {}
    with engines(plan) as backends, Orla(backends, mapping_for(backends), policy="priority") as orla:
        for fault in filter(None, orla.connect().values()):
            raise fault  # no ticket can be answered without it
        model = chat_model(backends[-1].url, backends[-1].model or "default", plan.api_key or "none")
        graph = orla.wrap(support_graph(model, plan.outbox), hints=priorities)  # the one line
        board = Board(len(plan.letters), time.monotonic())
        interrupted = False
        stop_listening = orla.subscribe(board.hear)
        try:
            with watch(board, orla):
                asyncio.run(answer_all(graph, plan.letters, board, emails))
        except KeyboardInterrupt:
            interrupted = True
        stop_listening()
        board.statistics = settled(orla)
    return DemoResult(board, emails, interrupted)


def mapping_for(backends: Sequence[Backend]) -> dict[str, str]:
    """Return the paper's mapping where there are two engines."""
    if len(backends) == 1:
        return {"*": backends[0].name}
    return {"classify": "light", "*": "heavy"}


async def answer_all(graph: Any, letters: Sequence[str], board: Board, emails: dict[int, Email]) -> None:
    """Run the graph for every letter at once: only many at a time show queues."""
    async with asyncio.TaskGroup() as group:
        for number, ticket in enumerate(letters, start=1):
            group.create_task(answer(graph, number, ticket, board, emails))


async def answer(graph: Any, number: int, ticket: str, board: Board, emails: dict[int, Email]) -> None:
    """Run the graph for one letter, and tell the board what each stage found."""
    run_id = uuid.uuid4()
    run = str(run_id)
    board.expect(run, number)
    try:
        async for step in graph.astream({"ticket": ticket}, {"run_id": run_id}, stream_mode="updates"):
            for update in step.values():
                board.fell_back(update.get("fallbacks") or [])
                if found := update.get("classification"):
                    board.classified(time.monotonic(), run, found)
                if email := update.get("email"):
                    emails[number] = email
    except (OrlaError, OpenAIError) as error:  # one ticket's trouble; the others go on
        board.note(time.monotonic(), run, "", "error", f"{type(error).__name__}: {error}")


def settled(orla: Orla) -> Statistics:
    """Return the statistics once the engines have erased what was flushed, or patience ends."""
    deadline_s, quiet_polls, last = time.monotonic() + SETTLE_PATIENCE_S, 0, orla.statistics()
    while quiet_polls < 3 and time.monotonic() < deadline_s:
        time.sleep(0.1)
        now = orla.statistics()
        quiet_polls = quiet_polls + 1 if now == last else 0
        last = now
    return last
