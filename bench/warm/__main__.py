"""What warm-ups gain on real engines: after tool waits, before a next stage, and after a night.

    make bench-warm                                       all of it, three rounds; half an hour, run it alone
    python -m bench.warm --place llamacpp --rounds 1      a first look, five minutes
    python -m bench.warm --write                          docs/warm-up.md and docs/warm-up.svg

Three situations, each a LangGraph graph, on a llama.cpp and on a vLLM that this starts:

    tools    workflows call, wait for a tool, and call again with a history that has grown. There are twice as many
             as the cache holds, and nothing is saved, so who returns finds nothing
    stages   one run after the other: a plan, then an order whose prompt begins with long rules and tools, the same
             for all. Between two runs others fill the cache
    night    runs are interrupted for a human, the engine is restarted, the runs are resumed. The node's own code
             works for some seconds between resume and call

The arms, on the same load in every round, in an order of its own, each from an empty cache:

    bare, bare again    plain ChatOpenAI; twice, since what differs between two equal arms is noise (night: once)
    orla, no warm-ups   Orla(..., warm_up=False)
    orla, warm-ups      Orla(...)
    orla, slots saved   the same, and slots saved to the engine's folder (llama.cpp's night only): what is there to be
                        restored is not warmed. The other arms save none

TTFT counts from the node's call, our queue included, of the calls that a situation is about: those after a tool, in
the second stage, after the resume. *Recomputed* are their prompt tokens that were not in the cache when they came.
*Warmed* are tokens that warm-ups computed: *used* are those that their call found, *wasted* those it did not. The
makespan says whether somebody else paid for it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

from bench.lib.command import ended, parser
from bench.lib.engines import LLAMACPP
from bench.lib.flags import above_zero, amount, count, folds, port
from bench.lib.machine import beside_others
from bench.lib.marks import put
from bench.lib.progress import bar, tell
from bench.warm import next_stage, night, tool_waits
from bench.warm.arms import AGAIN, ARMS, BARE, COLD, SAVED, WARM, Arm, Measured
from bench.warm.engines import PLACES, Place, crowded, overnight
from bench.warm.results import DRAWING, PAGE, draw, report

Turn = Callable[..., Coroutine[Any, Any, Measured]]


@dataclass(frozen=True, slots=True)
class Situation:
    """What is measured: its turn, its load, its engine, and how many calls of a turn are told by its bar."""

    turn: Turn
    shape: Any
    engine: Callable[[Place, int], AbstractContextManager[Any]]
    steps: int
    arms: tuple[Arm, ...]


def situations(args: argparse.Namespace) -> dict[str, Situation]:
    """Return the situations that are wanted, by name."""
    tools = tool_waits.Shape(args.workflows, args.calls, args.wait)
    stages, over = next_stage.Shape(args.runs), night.Shape(args.threads, args.prepare)
    arms = (BARE, AGAIN, COLD, WARM)
    every = {
        "tools": Situation(tool_waits.turn, tools, crowded, tools.workflows * tools.calls, arms),
        "stages": Situation(next_stage.turn, stages, crowded, next_stage.LEARN + stages.runs, arms),
        "night": Situation(night.turn, over, overnight, over.runs, (BARE, COLD, SAVED, WARM)),
    }
    return {name: every[name] for name in args.situation}


def place_of(args: argparse.Namespace, name: str) -> Place:
    """Return a place as the command line wants it."""
    place = PLACES[name]
    return replace(place, tokens=args.tokens or place.tokens, threads=args.cores)


def arms_of(situation: Situation, place: Place, wanted: list[str]) -> list[Arm]:
    """Return the arms that make sense at a place: only llama.cpp saves slots."""
    arms = [arm for arm in situation.arms if arm.name in wanted]
    return [arm for arm in arms if not arm.max_saved or place.engine == LLAMACPP]


# Measuring --------------------------------------------------------------------------------------------------


def measured(args: argparse.Namespace, done: list[Measured]) -> None:
    """Run every turn; what is measured is added to *done* at once, so that it outlasts Ctrl-C."""
    for place_name in args.place:
        place = place_of(args, place_name)
        for name, situation in situations(args).items():
            tell(f"{name}, {place.title}: starting the engine")
            arms = arms_of(situation, place, args.arms)
            with situation.engine(place, args.port) as engine:
                for seed in range(args.rounds):
                    for arm in Random(seed).sample(arms, len(arms)):
                        told = f"{name}, {place.title}, round {seed + 1}/{args.rounds}: {arm.name}"
                        done.append(one_turn(situation, place, engine, arm, seed, told))
                        if args.keep is not None:
                            args.keep.write_text(json.dumps([asdict(turn) for turn in done]), encoding="utf-8")


def one_turn(situation: Situation, place: Place, engine: Any, arm: Arm, seed: int, said: str) -> Measured:
    """Run one turn with a bar, and note what other processes take of the machine meanwhile."""
    turn = situation.turn(place, engine, arm, seed, situation.shape, bar(said, situation.steps))
    return asyncio.run(beside_others(engine.url, turn))


# The command line -------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    options = parser("warm", __doc__)
    add, names, arms = options.add_argument, ("tools", "stages", "night"), list(ARMS)
    usual = [name for name in PLACES if name != "vllm-plugin"]
    add("--situation", nargs="+", default=names, choices=names, metavar="NAME", help="tools, stages, night (all)")
    add("--place", nargs="+", default=usual, choices=PLACES, metavar="PLACE",
        help="llamacpp, vllm (both); vllm-plugin: with orla_lg inside, which keeps who waits by itself")  # fmt: skip
    add("--arms", nargs="+", default=arms, choices=arms, metavar="ARM", help=f"of {arms}")
    add("--rounds", type=count, default=3, metavar="N", help="so many loads, each through all arms (3)")
    add("--workflows", type=count, default=4, metavar="N", help="tools: at a time; the cache holds two (4)")
    add("--calls", type=folds, default=5, metavar="N", help="tools: of each workflow (5)")
    add("--wait", type=above_zero, default=12.0, metavar="S", help="tools: of a tool, on the mean (12)")
    add("--runs", type=count, default=6, metavar="N", help="stages: that count; three before them teach (6)")
    add("--threads", type=count, default=3, metavar="N", help="night: interrupted in a turn (3)")
    add("--prepare", type=amount, default=4.0, metavar="S", help="night: of own code between resume and call (4)")
    add("--tokens", type=count, metavar="N", help="of a workflow's first prompt, about (llama.cpp 600, vLLM 1400)")
    add("--cores", type=count, metavar="N", help="threads of the engine (one for each core)")
    add("--port", type=port, default=0, metavar="N", help="of the engine (a free one)")
    add("--keep", type=Path, metavar="FILE", help="write all calls there, as JSON")
    add("--write", action="store_true", help="write docs/warm-up.md and draw docs/warm-up.svg")
    return options.parse_args()


def command_line() -> str:
    """Return how this was started, for the reader of the figures."""
    words = shlex.join(word for word in sys.argv[1:] if word != "--write")
    return f"`make bench-warm BENCH={json.dumps(words, ensure_ascii=False)}`" if words else "`make bench-warm`"


def main() -> int:
    args, done = options(), list[Measured]()
    measured(args, done)
    tell("measured", last=True)
    lines = [f"Measured with {command_line()}.", "", *report(done)]
    print("\n".join(lines))
    if args.write:
        draw(done)
        put(PAGE, "warm", [*lines, "", f"![Time to the first token of calls that were warmed for]({DRAWING.name})"])
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "its engine is ended"))
