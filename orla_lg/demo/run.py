"""The demo run: many tickets at once, by the graph as it is and by the graph wrapped."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

from langchain_openai import ChatOpenAI
from openai import APIConnectionError, APIError, OpenAIError

from orla_lg import Backend, CallEvent, Cost, Happening, Hints, Orla, OrlaError, Statistics
from orla_lg.demo.board import Board
from orla_lg.demo.compare import ARMS, BARE, Figures
from orla_lg.demo.customers import customer_file
from orla_lg.demo.fallbacks import Email
from orla_lg.demo.graph import UNUSABLE, chat_model, support_graph
from orla_lg.demo.stopwatch import Bare, Stopwatch, TimedCall
from orla_lg.errors import EngineError
from orla_lg.timeline import Span

LIGHT_COST = Cost(input_per_mtoken=0.05, output_per_mtoken=0.10, cached_input_per_mtoken=0.01)
HEAVY_COST = Cost(input_per_mtoken=0.20, output_per_mtoken=0.60, cached_input_per_mtoken=0.04)
"""What the two engines would cost if they were the paper's: the table then shows what mapping is for."""

SLOTS = {"light": 2, "heavy": 2}
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
    outbox: Path | None = None
    url: str | None = None
    """An engine of the user's own; ``None`` starts two embedded ones."""
    model: str | None = None
    engine: str | None = None
    api_key: str | None = None
    arms: tuple[str, ...] = ARMS
    """Which arms are run, in this order."""
    files: bool = True
    """Whether each ticket comes with its customer's file."""
    records: Path | None = None
    """Where orla_lg writes the records of the wrapped arm."""


@dataclass(eq=False, slots=True)
class ArmResult:
    """How one arm went."""

    arm: str
    board: Board
    calls: list[TimedCall] = field(default_factory=list)
    emails: dict[int, Email] = field(default_factory=dict)
    spans: list[Span] = field(default_factory=list)
    """The calls as orla_lg recorded them, to be drawn; none of the bare arm."""
    began_s: float = 0.0
    whole_s: float = 0.0
    counted_tokens: int | None = None
    """Prompt tokens computed, by the engines' own counters; ``None`` where there are none."""

    @property
    def figures(self) -> Figures:
        """What the arm came to."""
        return Figures.of(self.arm, self.calls, self.whole_s)


@dataclass(frozen=True, slots=True)
class DemoResult:
    """How the run ended."""

    arms: Sequence[ArmResult]
    interrupted: bool

    @property
    def board(self) -> Board:
        """The last arm's board."""
        return self.arms[-1].board

    @property
    def emails(self) -> Mapping[int, Email]:
        """The last arm's letters, by ticket."""
        return self.arms[-1].emails

    @property
    def complete(self) -> bool:
        """Whether every ticket was answered in every arm."""
        return not self.interrupted and all(arm.board.done == arm.board.tickets for arm in self.arms)

    def arm(self, name: str) -> ArmResult | None:
        """Return an arm that ended, by its name."""
        return next((arm for arm in self.arms if arm.arm == name and arm.board.done), None)


Watch = Callable[[Board, Callable[[], Statistics] | None], AbstractContextManager[object]]
"""Shows a board while its arm runs; with the statistics of orla_lg, if it serves the arm."""


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
            model = plan.model or model_at(plan.url, plan.api_key)
            yield [Backend("engine", plan.url, model, kind, api_key=plan.api_key, cost=HEAVY_COST)]
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


def model_at(url: str, api_key: str | None) -> str | None:
    """Return the first model that an engine serves; ``None`` where it does not say."""
    asked = Request(url.rstrip("/") + "/models", headers={"Authorization": f"Bearer {api_key or 'none'}"})
    try:
        with urlopen(asked, timeout=PROPS_PATIENCE_S) as answer:
            return str(json.load(answer)["data"][0]["id"])
    except (URLError, OSError, ValueError, LookupError, TypeError):
        return None


def run(plan: Plan, watch: Watch) -> DemoResult:
    """Answer all tickets in each arm, watched; Ctrl-C ends it cleanly with what there is.

    Embedded engines are started for each arm, so that both begin with empty caches. An engine of the user's keeps
    what it has; there each arm's prompts begin with another number, and no arm finds what was computed before it.

    Raises:
        OrlaError: Nothing could be started.
    """
    if plan.outbox is not None:
        plan.outbox.parent.mkdir(parents=True, exist_ok=True)
    arms: list[ArmResult] = []
    desks = random.sample(range(1_000, 10_000), len(plan.arms))
    try:
        for nth, name in enumerate(plan.arms, start=1):
            title = f"{nth} of {len(plan.arms)}: {name}" if len(plan.arms) > 1 else ""
            arms.append(ArmResult(name, Board(len(plan.letters), time.monotonic(), arm=title)))
            with engines(plan) as backends:
                run_arm(plan, arms[-1], backends, watch, desk=str(desks[nth - 1]) if plan.url else "")
    except KeyboardInterrupt:
        if not arms[-1].calls:  # while its engines were starting
            arms.pop()
        if not arms:
            raise
        return DemoResult(arms, interrupted=True)
    return DemoResult(arms, interrupted=False)


def run_arm(plan: Plan, arm: ArmResult, backends: Sequence[Backend], watch: Watch, desk: str) -> None:
    """Answer all tickets once: by the graph as it is, or by the graph wrapped."""
    models = [chat_model(each.url, each.model or "default", plan.api_key or "none") for each in backends]
    graph = support_graph(models[0], models[-1], plan.outbox, desk)
    if arm.arm == BARE:
        bare = Bare(arm.board.hear, {"classify": backends[0], "*": backends[-1]})
        with watch(arm.board, None):
            timed(ArmTurn(graph.compile(), plan, arm, models, backends, bare))
    else:
        with Orla(backends, mapping_for(backends), policy="priority", records_file=plan.records) as orla:
            for fault in filter(None, orla.connect().values()):
                raise fault  # no ticket can be answered without it
            wrapped = orla.wrap(graph, hints=priorities)  # the one line
            serve(orla, ArmTurn(wrapped, plan, arm, models, backends), watch)


@dataclass(frozen=True, slots=True)
class ArmTurn:
    """What an arm is run with."""

    graph: Any
    plan: Plan
    arm: ArmResult
    models: Sequence[ChatOpenAI]
    backends: Sequence[Backend]
    bare: Bare | None = None


@contextmanager
def _answering(model: ChatOpenAI) -> Iterator[None]:
    try:
        yield
    except APIConnectionError as error:
        raise EngineError(f"the engine at {model.openai_api_base} does not answer: {error}") from error


async def warm(models: Sequence[ChatOpenAI]) -> None:
    """Ask each engine for a word: what the first call of a process or an engine takes longer is no arm's doing.

    Raises:
        EngineError: One does not answer.
    """
    schema = {
        "title": "greeting", "type": "object", "properties": {"ready": {"const": True}}, "required": ["ready"],
        "additionalProperties": False,
    }  # fmt: skip
    for model in models:
        with suppress(APIError, *UNUSABLE), _answering(model):  # what else is wrong, the arms will show
            await model.with_structured_output(schema, method="json_schema", strict=True).ainvoke("Ready?")


def serve(orla: Orla, turn: ArmTurn, watch: Watch) -> None:
    """Answer all tickets by a wrapped graph, with the board and the picture of its calls as listeners."""

    arm = turn.arm

    def draw(event: CallEvent) -> None:
        if event.kind is Happening.FINISHED and event.record is not None:
            arm.spans.append(Span.of(event.record.asdict(), event.at_s))

    arm.board.queues = frozenset(orla.statistics().backends)
    stop_listening = [orla.subscribe(listener) for listener in (arm.board.hear, draw)]
    try:
        with watch(arm.board, orla.statistics):
            timed(turn)
    finally:
        for stop in stop_listening:
            stop()
        arm.board.statistics = settled(orla)


def timed(turn: ArmTurn) -> None:
    """Answer all tickets, and note how long that took; on one event loop, since clients belong to theirs."""
    arm = turn.arm

    async def answers() -> None:
        if len(turn.plan.arms) > 1:
            await warm(turn.models)
        before = counted(turn.backends)
        arm.began_s = arm.board.started_s = arm.board.now_s = time.monotonic()
        await answer_all(turn.graph, turn.plan, arm, turn.bare)
        arm.whole_s = time.monotonic() - arm.began_s
        after = counted(turn.backends)
        arm.counted_tokens = None if before is None or after is None else after - before

    try:
        asyncio.run(answers())
    finally:
        if not arm.whole_s and arm.began_s:  # interrupted
            arm.whole_s = time.monotonic() - arm.began_s


def counted(backends: Sequence[Backend]) -> int | None:
    """Return how many prompt tokens these engines have computed so far; ``None`` where one does not count."""
    counts = []
    for backend in backends:
        try:
            with urlopen(
                backend.url.rstrip("/").removesuffix("/v1") + "/metrics", timeout=PROPS_PATIENCE_S
            ) as answer:
                found = re.search(rb"^llamacpp:prompt_tokens_total (\S+)", answer.read(), re.M)
            counts.append(round(float(found[1])) if found else None)
        except (URLError, OSError, ValueError):
            counts.append(None)
    known = [count for count in counts if count is not None]
    return sum(known) if len(known) == len(backends) else None


def mapping_for(backends: Sequence[Backend]) -> dict[str, str]:
    """Return the paper's mapping where there are two engines."""
    if len(backends) == 1:
        return {"*": backends[0].name}
    return {"classify": "light", "*": "heavy"}


async def answer_all(graph: Any, plan: Plan, arm: ArmResult, bare: Bare | None = None) -> None:
    """Run the graph for every letter at once: only many at a time show queues."""
    async with asyncio.TaskGroup() as group:
        for number, ticket in enumerate(plan.letters, start=1):
            state = {"ticket": ticket} | ({"file": customer_file(number)} if plan.files else {})
            group.create_task(answer(graph, number, state, arm, bare))


async def answer(graph: Any, number: int, state: Mapping[str, str], arm: ArmResult, bare: Bare | None) -> None:
    """Run the graph for one letter, and tell the board what each stage found."""
    run_id, board = uuid.uuid4(), arm.board
    run = str(run_id)
    board.expect(run, number)
    stopwatch = Stopwatch(run, arm.calls, bare)
    try:
        config = {"run_id": run_id, "callbacks": [stopwatch]}
        async for step in graph.astream(state, config, stream_mode="updates"):
            for update in step.values():
                board.fell_back(update.get("fallbacks") or [])
                if found := update.get("classification"):
                    board.classified(time.monotonic(), run, found)
                if email := update.get("email"):
                    arm.emails[number] = email
        stopwatch.ended("done")
    except (OrlaError, OpenAIError) as error:  # one ticket's trouble; the others go on
        stopwatch.ended("failed")
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
