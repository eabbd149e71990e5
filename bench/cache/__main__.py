"""Flush per request, per workflow, or leave it to the engine: the Orla paper's cache experiment on real engines.

    make bench-cache                                    starts its own engines; a quarter of an hour, run it alone
    python -m bench.cache --engine llamacpp --rounds 1  a first look, some minutes
    python -m bench.cache --write                       docs/cache.md and docs/cache.svg

The load. A support desk: each case goes through five stages (classify, check, draft, review, reply), five nodes of a
LangGraph graph. A stage looks something up (0.2 to 3 s) and asks the model with all that was said before. All cases
begin with a policy of some 640 tokens and grow by 80 a stage; answers have 24. Cases arrive as a Poisson process,
about as fast as the engine can serve them, so that calls of different cases interleave.

The places. Each engine twice: *short* of room for all the cases that are under way, and with *room* for all of them.
llama.cpp has 3 or 8 slots, vLLM 2,048 or 7,680 tokens.

The arms. Every round gives all arms the same cases at the same times, in an order of its own, each from an empty
cache:

    engine's own LRU, the same again   plain ChatOpenAI; twice, to show the noise
    reset of everything per request    the same, the whole cache reset after each call (vLLM, short: the paper's way)
    flush per request                  Orla(..., memory="flush_per_request"): the paper's baseline (short)
    flush per workflow                 Orla(...), nothing else said

The figures. TTFT counts from the node's call, our queue included. *Recomputed* are prompt tokens not found in the
cache; the *bound* is what an infinite cache that shares every prefix leaves of them. llama.cpp's slots share nothing,
so that there each case computes the policy at least once.

On vLLM the last two arms need the orla_lg plugin; on an engine without it they are left out, with a word. An engine
of your own (--url, with one --engine and one --pool) must be used by nothing else: vLLM with VLLM_SERVER_DEV_MODE=1
and --enable-prompt-tokens-details, llama.cpp with --slot-save-path. A run that is stopped (Ctrl-C) goes on from its
last turn when it is started again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.cache.arms import Turns, arms_at
from bench.cache.engines import PLACES, ROOM, SHORT, Place, options_of
from bench.cache.results import PAGE, Figures, draw, in_order
from bench.cache.workflows import ANSWER_TOKENS, STAGES, tickets
from bench.lib.command import ended, parser
from bench.lib.engines import LLAMACPP, VLLM_CPU, Engine, engine_at
from bench.lib.flags import above_zero, count
from bench.lib.kept import Kept
from bench.lib.marks import put
from bench.lib.progress import tell
from bench.lib.workflows import Session

CASES = 8


def rounds_at(place: Place, rounds: int) -> int:
    """Return how many rounds a place has: where all fits nothing can differ by much, so half of them do."""
    return rounds if place.pool == SHORT else max(1, rounds // 2)


def settings_of(args: argparse.Namespace, place: Place, engine: Engine) -> dict[str, Any]:
    """Return what must be the same in all turns that are compared."""
    load = {"cases": args.cases, "stages": len(STAGES), "answer_tokens": ANSWER_TOKENS}
    return {**asdict(place), **load, "model": engine.model, "plugin": engine.has_plugin}


def kept_at(args: argparse.Namespace, place: Place) -> Path:
    """Return the file for a place's turns."""
    keep: Path = args.keep
    return keep.with_name(f"{keep.stem}-{place.name}{keep.suffix}")


def measure(args: argparse.Namespace, place: Place, engine: Engine, kept: Kept) -> None:
    """Run every turn of a place that is not kept yet."""
    turns, every_s = Turns(place, engine), args.every or place.every_s
    arms, rounds = arms_at(place, engine), rounds_at(place, args.rounds)

    def load(seed: int) -> list[Session]:
        return tickets(args.cases, every_s, seed)

    asyncio.run(kept.measure(engine.url, arms, rounds, load, turns.turn, title=place.name))
    if turns.resets_refused:
        tell(f"{place.name}: {turns.resets_refused} resets were refused, since calls ran", last=True)


def measured(args: argparse.Namespace, place: Place) -> Figures:
    """Return the figures of a place, after measuring what is missing."""
    if args.again:
        return Figures(place, Kept(kept_at(args, place), {}).turns)
    with engine_at(options_of(place), args.url) as engine:
        if not engine.has_plugin:
            tell(f"{place.name}: no orla_lg plugin here; the arms that flush a workflow are left out", last=True)
        kept = Kept(kept_at(args, place), settings_of(args, place, engine))
        measure(args, place, engine, kept)
    return Figures(place, kept.turns)


# The command line -------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    options = parser("cache", __doc__)
    add, engines, pools = options.add_argument, (LLAMACPP, VLLM_CPU), (SHORT, ROOM)
    add("--engine", nargs="+", default=engines, choices=engines, metavar="ENGINE", help="llamacpp, vllm (both)")
    add("--pool", nargs="+", default=pools, choices=pools, metavar="POOL", help="short, room (both)")
    add("--rounds", type=count, default=2, metavar="N", help="through all arms; where all fits, half as many (2)")
    add("--cases", type=count, default=CASES, metavar="N", help=f"in a round ({CASES})")
    add("--every", type=above_zero, metavar="S", help="between two arrivals, on the mean (llama.cpp 4, vLLM 1.2)")
    add("--url", help="an engine that runs already; with one --engine and one --pool")
    add("--keep", type=Path, default=Path("cache.json"), metavar="FILE",
        help="where turns are kept, the place added to the name (cache.json: cache-vllm-short.json …)")  # fmt: skip
    add("--again", action="store_true", help="measure nothing, take what is kept")
    add("--write", action="store_true", help="write docs/cache.md and draw docs/cache.svg")
    args = options.parse_args()
    if args.url and (len(args.engine) != 1 or len(args.pool) != 1):
        options.error("--url is one engine: say which with one --engine and one --pool")
    return args


def lines_of(engine: str, found: Sequence[Figures]) -> list[str]:
    """Return what is to be told of an engine."""
    mine = [figures for figures in found if figures.place.engine == engine]
    told: list[str] = []
    for figures in mine:
        told += [figures.setting(), "", *figures.table(), ""]
    return [*told, *(f"* {line}" for figures in mine for line in figures.verdict())]


def main() -> int:
    args = options()
    places = [place for place in PLACES if place.engine in args.engine and place.pool in args.pool]
    found = in_order({place.name: measured(args, place) for place in places})
    tell("measured", last=True)
    lines = {engine: lines_of(engine, found) for engine in dict.fromkeys(place.engine for place in places)}
    print("\n\n".join("\n".join(told) for told in lines.values()))
    if args.write:
        for engine, told in lines.items():
            put(PAGE, f"cache: {engine}", told)
        draw(found)
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "the same command goes on with the turn that was broken off"))
