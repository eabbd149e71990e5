"""Eight Send branches with a prefix in common: what is prefilled, and how long the step takes, bare and wrapped.

    make bench-fanout                         starts its own engines; some minutes, run it alone
    python -m bench.fanout --rounds 1         a first look
    python -m bench.fanout --write            docs/fanout.md, which has the load and the places

The graph sends eight branches at once to one node and joins their answers: bare, where two engines are taken in turn,
and wrapped with a mapping that names the engines there are, by load. *Prefilled* are the prompt tokens that were not
cached, as the answers say, over the tokens of one branch's prompt: 1.0 is the least, 8.0 the most. The goal is 1.3.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import operator
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from random import Random
from statistics import fmean
from typing import Annotated, Any, TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph
from langgraph.types import Send

from bench.lib.calls import CallSeen, JobSeen, Turn, makespan_s, recomputed
from bench.lib.client import seen
from bench.lib.command import DOCS, ended, finish, parser, tell, usual
from bench.lib.figures import Column, Rounds, spread, table
from bench.lib.flags import count
from bench.lib.kept import Kept
from orla_lg import Backend, Orla
from orla_lg.engines import EngineOptions, running_engine
from orla_lg.mappers import ExplicitMapper, LoadAware
from orla_lg_llamacpp.embedded import usable_cores
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.server import SimServer

GOAL = 1.3
SLOTS, CONTEXT_TOKENS = 8, 1536
PLACES = {"slots": "llama.cpp, 8 slots", "two": "two llama.cpp, 8 slots each", "prefix": "two simulated vLLM"}
TOPICS = ("refunds", "parcels", "invoices", "repairs", "returns", "vouchers", "accounts", "delays")
TEXT = (
    "the order was sent to our store and a friend of mine asked for help with it on Monday because some part did not "
    "work as the page said so we wrote to them and they gave us a number that nobody there could find in the list"
)


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
        ended_s = time.monotonic()  # whole, not streamed
        return {"seen": [seen(answer, branch["number"], 0, began_s, ended_s, ended_s)]}

    graph = StateGraph(Step).add_node("ask", ask).add_node("join", lambda state: {})
    return graph.add_conditional_edges(START, send, ["ask"]).add_edge("ask", "join")


def prefix_of(number: int, words: int) -> str:
    """Make up a system message that begins like no other round's."""
    drawn = Random(number)
    return f"Case {number}. Answer in one word. " + " ".join(drawn.choices(TEXT.split(), k=words))


@dataclass(frozen=True)
class Arm:
    """A graph at a place."""

    place: str
    name: str
    graph: Any

    async def run(self, words: int, seed: int) -> Turn:
        """Run the step of eight branches, with a prefix that no other turn has."""
        prefix, began_s = prefix_of(2 * seed + (self.name == "wrapped"), words), time.monotonic()
        state = await self.graph.ainvoke({"prefix": prefix, "seen": []})
        job = JobSeen(0, 0.0, time.monotonic() - began_s)
        return Turn(self.name, seed, 0, state["seen"], [job], place=self.place)


def backends_at(place: str, stack: contextlib.ExitStack) -> list[Backend]:
    """Start a place's engines; llama.cpp servers share the cores evenly."""
    count = 1 if place == "slots" else 2
    if place == "prefix":
        simulated = [EngineParameters(block_tokens=16, kv_blocks=2910, seed=number) for number in range(count)]
        urls = [stack.enter_context(SimServer(each)).url for each in simulated]
        return [Backend(f"engine{n}", url, model="sim", engine="sim") for n, url in enumerate(urls)]
    threads = max(1, len(usable_cores()) // count)
    options = EngineOptions("llamacpp", slots=SLOTS, context_tokens=CONTEXT_TOKENS, threads=threads)
    engines = [stack.enter_context(running_engine(options)) for _ in range(count)]
    return [Backend(f"engine{n}", each.url, model=each.name, engine="llamacpp") for n, each in enumerate(engines)]


@contextlib.contextmanager
def arms_at(place: str, answer_tokens: int) -> Iterator[list[Arm]]:
    """Start a place's engines and give its arms."""
    with contextlib.ExitStack() as stack:
        backends = backends_at(place, stack)
        options: dict[str, Any] = {"api_key": "any", "max_tokens": answer_tokens, "temperature": 0}
        graph = graph_of([ChatOpenAI(base_url=each.url, model=each.model or "", **options) for each in backends])
        mapper = LoadAware(ExplicitMapper({"*": [each.name for each in backends]}))
        orla = stack.enter_context(Orla(backends, mapper))
        yield [Arm(place, "bare", graph.compile()), Arm(place, "wrapped", orla.wrap(graph))]


def prompt_tokens(turn: Turn) -> float:
    """Return the tokens of one branch's prompt, on the mean."""
    return fmean(call.prompt_tokens for call in turn.calls)


def prefilled(turn: Turn) -> float:
    return recomputed(turn.calls) / prompt_tokens(turn)


COLUMNS = (
    Column("prefilled, of one branch's prompt", prefilled),
    Column("the step, s", lambda turn: makespan_s(turn.jobs)),
    Column("a branch's call, s", lambda turn: fmean(call.ended_s - call.called_s for call in turn.calls)),
)


def report(found: dict[str, Rounds[Turn]]) -> list[str]:
    rows = [
        [PLACES[place], arm, *(spread(rounds.column(arm, column.of)).shown(bold=True) for column in COLUMNS)]
        for place, rounds in found.items()
        for arm in rounds.arms
    ]
    return table(["engines", "graph", *(column.title for column in COLUMNS)], rows)


def verdict(place: str, rounds: Rounds[Turn]) -> str:
    """Say whether the goal is met at a place; where the bare arm meets it too, the load shows nothing."""
    bare, wrapped = (spread(rounds.column(arm, prefilled)).middle for arm in ("bare", "wrapped"))
    met = "met" if wrapped <= GOAL else "MISSED"
    nothing = ", but bare meets it too: this load shows nothing" if bare <= GOAL else ""
    return f"{PLACES[place]}: goal, at most {GOAL} of one branch's prompt: {met}{nothing}"


def options() -> argparse.Namespace:
    options = parser("fanout", __doc__)
    add = options.add_argument
    add("--places", nargs="+", default=list(PLACES), choices=PLACES, metavar="PLACE", help=f"of {', '.join(PLACES)}")
    add("--words", type=count, default=680, metavar="N", help="of the prefix; a token each, about (680)")
    add("--answer-tokens", type=count, default=12, metavar="N", help="at most, of an answer (12)")
    usual(options, rounds=5, writes="docs/fanout.md")
    return options.parse_args()


def main() -> int:
    args, found = options(), dict[str, Rounds[Turn]]()
    for place in args.places:
        tell(f"{place}: starting engines")
        kept = Kept(None, {})
        with arms_at(place, args.answer_tokens) as arms:
            asyncio.run(kept.measure(None, arms, args.rounds + 1, lambda seed: args.words, Arm.run, place=place))
        counted = [turn for turn in kept.turns if turn.seed]  # the first round teaches, and does not count
        found[place] = Rounds(counted, ["bare", "wrapped"])
    tokens = fmean(prompt_tokens(turn) for rounds in found.values() for turn in rounds.all())
    setting = (
        f"{args.rounds} rounds; a branch's prompt has {tokens:.0f} tokens, its answer up to {args.answer_tokens}."
    )
    lines = [setting, "", *report(found), "", *(f"* {verdict(*each)}" for each in found.items())]
    return finish(lines, "fanout", DOCS / "fanout.md" if args.write else None)


if __name__ == "__main__":
    sys.exit(ended(main, "its engines are ended"))
