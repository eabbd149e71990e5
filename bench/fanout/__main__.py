"""Eight Send branches with a prefix in common: what is prefilled, and how long the step takes, bare and wrapped.

    make bench-fanout                         starts its own engines; some minutes, run it alone
    python -m bench.fanout --rounds 1         a first look
    python -m bench.fanout --write            docs/fanout.md

The graph sends eight branches at once (LangGraph's Send) to one node and joins their answers. Their prompts begin
with the same system message of some 700 tokens, another one in each round; each asks a short question of its own
and is answered in a few tokens. The places:

    slots       one llama.cpp, eight slots
    two         two llama.cpp of eight slots each, serving the same model with half of the cores each
    prefix      two simulated engines that share prefixes as vLLM does, serving the same model

The arms are the same graph: bare with ChatOpenAI, which at two engines takes them in turn, as a load balancer does;
and wrapped by Orla with a mapping that names the engines there are, by load. Every round runs all arms, in changing
order, after a round that is not counted. Prefilled are the prompt tokens that the engine did not find in its cache,
as its answers say, over the tokens of one branch's prompt: 1.0 is the least, 8.0 the most. The goal is 1.3.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import operator
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Annotated, Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from bench.lib.calls import CallSeen, recomputed
from bench.lib.command import ended, parser
from bench.lib.figures import rotated, spread, table
from bench.lib.flags import count
from bench.lib.marks import DOCS, put
from bench.lib.progress import tell
from orla_lg import Backend, Orla
from orla_lg.engines import EngineOptions, running_engine
from orla_lg.mappers import ExplicitMapper, LoadAware
from orla_lg_llamacpp.embedded import usable_cores
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.server import SimServer

PAGE = DOCS / "fanout.md"
GOAL = 1.3
BRANCHES, SLOTS, CONTEXT_TOKENS = 8, 8, 1536
PLACES = {"slots": "llama.cpp, 8 slots", "two": "two llama.cpp, 8 slots each", "prefix": "two simulated vLLM"}
TOPICS = ("refunds", "parcels", "invoices", "repairs", "returns", "vouchers", "accounts", "delays")
TEXT = (
    "the order was sent to our store and a friend of mine asked for help with it on Monday because some part did not "
    "work as the page said so we wrote to them and they gave us a number that nobody there could find in the list"
)


# The graph --------------------------------------------------------------------------------------------------


class Step(TypedDict):
    prefix: str
    seen: Annotated[list[CallSeen], operator.add]


class Branch(TypedDict):
    prefix: str
    topic: str
    number: int


def graph_of(clients: Sequence[ChatOpenAI]) -> StateGraph[Any, Any, Any, Any]:
    """Send a branch for each topic; each takes the next client in turn."""

    def send(state: Step) -> list[Send]:
        branches = [Branch(prefix=state["prefix"], topic=topic, number=n) for n, topic in enumerate(TOPICS)]
        return [Send("ask", branch) for branch in branches]

    async def ask(branch: Branch) -> dict[str, list[CallSeen]]:
        client, began_s = clients[branch["number"] % len(clients)], time.monotonic()
        answer = await client.ainvoke([("system", branch["prefix"]), ("user", f"Is it about {branch['topic']}?")])
        usage: Any = answer.usage_metadata  # type: ignore[attr-defined]
        cached, ended_s = usage.get("input_token_details", {}).get("cache_read", 0), time.monotonic()
        tokens = (usage["input_tokens"], cached, usage["output_tokens"])
        return {"seen": [CallSeen(branch["number"], 0, began_s, ended_s, ended_s, *tokens)]}  # whole, not streamed

    async def join(state: Step) -> dict[str, list[CallSeen]]:
        return {}

    graph = StateGraph(Step).add_node("ask", ask).add_node("join", join)
    return graph.add_conditional_edges(START, send, ["ask"]).add_edge("ask", "join").add_edge("join", END)


def prefix_of(number: int, words: int) -> str:
    """Make up a system message that begins like no other round's."""
    drawn = Random(number)
    return f"Case {number}. Answer in one word. " + " ".join(drawn.choices(TEXT.split(), k=words))


# The arms ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """One step of eight branches."""

    prefilled: float
    """Prompt tokens that were not cached, over the tokens of one branch's prompt."""
    wall_s: float
    latency_s: float
    """Of a branch's call, on the mean: our queue included."""
    prompt_tokens: float
    """Of one branch, on the mean."""


def turn_of(seen: Sequence[CallSeen], wall_s: float) -> Turn:
    prompt = statistics.mean(each.prompt_tokens for each in seen)
    latency_s = statistics.mean(each.ended_s - each.called_s for each in seen)
    return Turn(recomputed(seen) / prompt, wall_s, latency_s, prompt)


@dataclass
class Arm:
    """A graph at a place."""

    place: str
    name: str
    graph: Any
    turns: list[Turn] = field(default_factory=list)

    async def run(self, prefix: str) -> Turn:
        began_s = time.monotonic()
        state = await self.graph.ainvoke({"prefix": prefix, "seen": []})
        return turn_of(state["seen"], time.monotonic() - began_s)


@contextlib.contextmanager
def llamas(count: int) -> Iterator[list[Backend]]:
    """Start llama.cpp servers that share the cores evenly."""
    threads = max(1, len(usable_cores()) // count)
    options = EngineOptions("llamacpp", slots=SLOTS, context_tokens=CONTEXT_TOKENS, threads=threads)
    with contextlib.ExitStack() as stack:
        engines = [stack.enter_context(running_engine(options)) for _ in range(count)]
        yield [Backend(f"engine{n}", each.url, model=each.name, engine="llamacpp") for n, each in enumerate(engines)]


@contextlib.contextmanager
def simulated(count: int) -> Iterator[list[Backend]]:
    """Start simulated engines."""
    with contextlib.ExitStack() as stack:
        each = [EngineParameters(block_tokens=16, kv_blocks=2910, seed=number) for number in range(count)]
        servers = [stack.enter_context(SimServer(parameters)) for parameters in each]
        yield [Backend(f"engine{n}", server.url, model="sim", engine="sim") for n, server in enumerate(servers)]


@contextlib.contextmanager
def arms_at(place: str, answer_tokens: int) -> Iterator[list[Arm]]:
    """Start a place's engines and give its arms."""
    start: Callable[[], contextlib.AbstractContextManager[list[Backend]]] = {
        "slots": lambda: llamas(1),
        "two": lambda: llamas(2),
        "prefix": lambda: simulated(2),
    }[place]
    with start() as backends:
        said: dict[str, Any] = {"api_key": "any", "max_tokens": answer_tokens, "temperature": 0}
        graph = graph_of([ChatOpenAI(base_url=each.url, model=each.model or "", **said) for each in backends])
        mapper = LoadAware(ExplicitMapper({"*": [each.name for each in backends]}))
        with Orla(backends, mapper) as orla:
            yield [Arm(place, "bare", graph.compile()), Arm(place, "wrapped", orla.wrap(graph))]


async def measure(arms: Sequence[Arm], rounds: int, words: int) -> None:
    number = 0
    for turn in range(rounds + 1):
        for arm in rotated(arms, turn):
            number += 1
            tell(f"{arm.place}, round {turn}/{rounds}: {arm.name}")
            seen = await arm.run(prefix_of(number, words))
            if turn:
                arm.turns.append(seen)


# The figures ------------------------------------------------------------------------------------------------


def prefilled(arm: Arm) -> float:
    return statistics.median(turn.prefilled for turn in arm.turns)


def report(arms: Sequence[Arm]) -> list[str]:
    rows = []
    for arm in arms:
        columns = [[getattr(turn, name) for turn in arm.turns] for name in ("prefilled", "wall_s", "latency_s")]
        rows.append([PLACES[arm.place], arm.name, *(spread(column).shown(bold=True) for column in columns)])
    return table(["engines", "graph", "prefilled, of one branch's prompt", "the step, s", "a branch's call, s"], rows)


def verdict(arms: Sequence[Arm]) -> list[str]:
    """Say at which places the goal is met; where the bare arm meets it too, the load shows nothing."""
    lines = []
    for place in dict.fromkeys(arm.place for arm in arms):
        bare, wrapped = (next(a for a in arms if (a.place, a.name) == (place, name)) for name in ("bare", "wrapped"))
        said = "met" if prefilled(wrapped) <= GOAL else "MISSED"
        if prefilled(bare) <= GOAL:
            said += ", but bare meets it too: this load shows nothing"
        lines.append(f"{PLACES[place]}: goal, at most {GOAL} of one branch's prompt: {said}")
    return lines


# The command line -------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    options = parser("fanout", __doc__)
    add = options.add_argument
    add("--rounds", type=count, default=5, metavar="N", help="that count, after one that does not (5)")
    add("--places", nargs="+", default=list(PLACES), choices=PLACES, metavar="PLACE", help=f"of {', '.join(PLACES)}")
    add("--words", type=count, default=680, metavar="N", help="of the prefix; a token each, about (680)")
    add("--answer-tokens", type=count, default=12, metavar="N", help="at most, of an answer (12)")
    add("--write", action="store_true", help="write docs/fanout.md")
    return options.parse_args()


def main() -> int:
    args, arms = options(), list[Arm]()
    for place in args.places:
        tell(f"{place}: starting engines")
        with arms_at(place, args.answer_tokens) as here:
            asyncio.run(measure(here, args.rounds, args.words))
            arms += here
    tell("measured", last=True)
    tokens = statistics.mean(turn.prompt_tokens for arm in arms for turn in arm.turns)
    setting = (
        f"{args.rounds} rounds; a branch's prompt has {tokens:.0f} tokens, its answer up to {args.answer_tokens}."
    )
    lines = [setting, "", *report(arms), "", *(f"* {line}" for line in verdict(arms))]
    print("\n".join(lines))
    if args.write:
        put(PAGE, "fanout", lines)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "its engines are ended"))
