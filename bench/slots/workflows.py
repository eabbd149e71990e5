"""One arm's turn: its load, an engine of its own, and the graph that all workflows run."""

from __future__ import annotations

import asyncio
import contextlib
import json
import operator
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from pydantic import SecretStr

from orla_lg_llamacpp.embedded import free_port
from orla_lg_llamacpp.model import ensure_model
from orla_lg_sim.text import prose

KB_PER_TOKEN = 23.0
"""Of the demo's model."""

MARGIN_TOKENS = 64
"""Of a slot, for the chat template."""


@dataclass(frozen=True)
class Shape:
    """The load, and the engine's size; tokens of prompts are made up, one a word."""

    workflows: int
    slots: int
    calls: int
    tokens: int
    grow: int
    answer_tokens: int
    wait: float
    arrive: float
    cache_ram: int
    threads: int
    port: int

    @property
    def longest_tokens(self) -> int:
        """What a workflow may grow to, its last answer included."""
        return round(self.tokens * 1.15) + self.calls * (self.grow + self.answer_tokens + 16)

    @property
    def cached_workflows(self) -> int:
        """How many workflows a cache of ``cache_ram`` MiB holds at their ends."""
        return max(1, int(self.cache_ram * 1024 / (self.longest_tokens * KB_PER_TOKEN)))


@dataclass(frozen=True)
class Arm:
    name: str
    wrapped: bool
    bounded: bool = True
    """Its cache beside the slots holds no more than ``cache_ram``."""


# The load ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """One workflow: what it says before each call, and how long its tools take in between."""

    begin_s: float
    said: tuple[str, ...] = field(repr=False)
    waits_s: tuple[float, ...]


def sessions_of(shape: Shape, seed: int) -> list[Session]:
    """Make up the workflows of a round; no two of them begin alike."""
    dice, made = Random(seed), []
    for number in range(shape.workflows):
        lengths = [round(shape.tokens * dice.uniform(0.85, 1.15)), *[shape.grow] * (shape.calls - 1)]
        said = tuple("".join(prose(dice, tokens)) for tokens in lengths)
        waits_s = tuple(dice.uniform(0.5, 1.5) * shape.wait for _ in range(shape.calls))
        made.append(Session(number * shape.arrive, (f"Case {seed}.{number}: {said[0]}", *said[1:]), waits_s))
    return made


# The engine -------------------------------------------------------------------------------------------------

SERVE = """
import json, sys
said = json.loads(sys.argv[1])
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.model_alias = said["model"], {"smollm2"}
params.hostnames, params.port, params.verbosity = ["127.0.0.1"], said["port"], 0
params.n_parallel, params.n_ctx = said["slots"], said["slots"] * said["context"]
params.cpuparams.n_threads = params.cpuparams_batch.n_threads = said["threads"]
params.fit_params = params.ui = False
params.use_jinja = params.endpoint_slots = params.endpoint_props = True
params.cache_ram_mib = said["cache_ram"]
if said["save"]:
    params.slot_save_path, params.cache_idle_slots = said["save"], False
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
sys.stdin.read()
"""


@dataclass
class Engine:
    """A llama.cpp in a process of its own."""

    url: str
    pid: int
    folder: Path

    def peak_mib(self) -> float | None:
        """Return the most memory it ever had, in MiB; ``None`` where the system does not tell."""
        with contextlib.suppress(OSError):
            found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{self.pid}/status").read_text())
            return None if found is None else int(found[1]) / 1024
        return None

    def files_mib(self) -> float:
        return sum(path.stat().st_size for path in self.folder.iterdir()) / 2**20


@contextlib.contextmanager
def engine_for(arm: Arm, shape: Shape) -> Iterator[Engine]:
    """Start an engine as the arm wants it."""
    context = shape.longest_tokens + MARGIN_TOKENS
    room = -1 if not arm.bounded else shape.cache_ram
    with tempfile.TemporaryDirectory(prefix="bench-slots-") as folder:
        said = {
            "model": str(ensure_model()), "port": shape.port or free_port(), "slots": shape.slots, "context": context,
            "threads": shape.threads, "cache_ram": 0 if arm.wrapped else room, "save": f"{folder}/" * arm.wrapped,
        }  # fmt: skip
        command = [sys.executable, "-c", SERVE, json.dumps(said)]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None and process.stdin is not None
            try:
                address = process.stdout.readline().strip()
                if not address:
                    raise SystemExit(f"llama.cpp did not start with {said}")
                yield Engine(f"{address}/v1", process.pid, Path(folder))
            finally:
                process.kill()


# The graph --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """One call; times in seconds after the turn's begin."""

    session: int
    number: int
    called_s: float
    first_s: float
    ended_s: float
    prompt_tokens: int
    cached_tokens: int


class State(TypedDict):
    number: int
    history: Annotated[list[AnyMessage], operator.add]
    seen: Annotated[list[Seen], operator.add]


class Turn:
    """One arm with one load."""

    def __init__(self, engine: Engine, sessions: Sequence[Session], shape: Shape) -> None:
        self._sessions, self._shape = sessions, shape
        self._model = ChatOpenAI(
            base_url=engine.url, api_key=SecretStr("any"), model="smollm2", temperature=0, max_retries=0, timeout=900,
            stream_usage=True, max_completion_tokens=shape.answer_tokens,
        )  # fmt: skip
        self._begin_s = time.monotonic()
        self.done = 0

    def graph(self) -> StateGraph[Any, Any, Any, Any]:
        """Ask, wait as for a tool, ask again."""
        graph = StateGraph(State).add_node("ask", self._ask).add_node("tool", self._tool)
        return graph.add_edge(START, "ask").add_edge("ask", "tool").add_conditional_edges("tool", self._next)

    async def _ask(self, state: State) -> dict[str, Any]:
        number, calls = state["number"], len(state["seen"])
        said = HumanMessage(self._sessions[number].said[calls])
        called_s, first_s, whole = self._now(), None, AIMessageChunk("")
        async for chunk in self._model.astream([*state["history"], said]):
            if first_s is None and chunk.content:
                first_s = self._now()
            whole += chunk  # type: ignore[assignment]
        usage: Any = whole.usage_metadata
        cached = (usage.get("input_token_details") or {}).get("cache_read") or 0
        ended_s = self._now()
        seen = Seen(number, calls, called_s, first_s or ended_s, ended_s, usage["input_tokens"], cached)
        self.done += 1
        return {"history": [said, AIMessage(str(whole.content))], "seen": [seen]}

    async def _tool(self, state: State) -> dict[str, Any]:
        await asyncio.sleep(self._sessions[state["number"]].waits_s[len(state["seen"]) - 1])
        return {}

    def _next(self, state: State) -> str:
        return "ask" if len(state["seen"]) < self._shape.calls else "__end__"

    def _now(self) -> float:
        return time.monotonic() - self._begin_s

    async def run(self, graph: Any) -> list[Seen]:
        """Let all workflows arrive, and see them end."""
        self._begin_s, all_seen = time.monotonic(), list[Seen]()

        async def one(number: int) -> None:
            await asyncio.sleep(self._sessions[number].begin_s)
            config = {"configurable": {"thread_id": f"case-{number}"}, "recursion_limit": 1000}
            state = await graph.ainvoke({"number": number, "history": [], "seen": []}, config)
            all_seen.extend(state["seen"])

        async with asyncio.TaskGroup() as group:
            for number in range(len(self._sessions)):
                group.create_task(one(number))
        return all_seen
