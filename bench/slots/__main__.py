"""More workflows than slots on a real llama.cpp: what those that come back wait for, bare and wrapped.

    make bench-slots                              all arms, one round: some ten minutes on two quiet cores
    python -m bench.slots --rounds 5 --write      what docs/slots.md shows
    python -m bench.slots --workflows 6 --slots 2 --calls 3 --tokens 200 --cache-ram 12         a first look

Sixteen workflows (runs of one LangGraph graph, each on a thread) call a model, wait as for a tool, and call again
with a history that has grown; four slots serve them. Their prompts are made up and begin alike in nothing. The arms:

    stock                 ChatOpenAI against llama.cpp with its default flags: it picks a slot by likeness of prompts,
                          whoever loses one is kept in a RAM cache of --cache-ram MiB, with room for some of them
    stock again           the same once more: what differs between two equal arms is noise
    orla                  the same graph wrapped; the engine without RAM cache, with a folder to save slots to
    orla, as many bytes   its files together no larger than the RAM cache of stock   (with --arms)
    stock, all the room   a RAM cache for everybody: what memory without end would do (with --arms)

Slots and context, and the memory for them, are the same in all arms. On top of that stock has its RAM cache; the
wrapped arm has none, and files on a disk instead. The engine's peak memory and the files are told beside the times:
the kernel keeps files in memory as long as nobody else wants it. Each turn gets an engine of its own. Every round
runs all arms on the same load, in changing order. Times are taken by the node from its call to the first token,
queues included; a workflow's first call counts for the makespan only. Goals: p95 of those that return at least 3
times shorter, p50 no longer.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from dataclasses import asdict, fields
from pathlib import Path

from bench.lib.client import connected, model_at
from bench.lib.command import ended, parser
from bench.lib.figures import Rounds, rotated
from bench.lib.flags import amount, count, port, whole
from bench.lib.marks import put
from bench.lib.progress import bar, tell
from bench.lib.workflows import agent, play
from bench.slots.results import AGAIN, DRAWING, ORLA, PAGE, STOCK, Measured, draw, report, verdict
from bench.slots.workflows import Arm, Shape, engine_for, sessions_of
from orla_lg import Backend
from orla_lg_llamacpp.embedded import usable_cores

ARMS = (Arm(STOCK, False), Arm(AGAIN, False), Arm(ORLA, True, bounded=False))
MORE = (Arm("orla, as many bytes", True), Arm("stock, all the room", False, bounded=False))


async def measure(arm: Arm, seed: int, shape: Shape, said: str) -> Measured:
    """Run one arm on an engine of its own, with a bar."""
    sessions, files = sessions_of(shape, seed), shape.cached_workflows if arm.bounded else 2 * shape.workflows
    with engine_for(arm, shape) as engine:
        backend = Backend("llama", engine.url, model="smollm2", engine="llamacpp", max_saved=files)
        with connected([backend], {"*": "llama"}, wrapped=arm.wrapped) as orla:
            async with model_at(engine.url, "smollm2") as model:
                tick = bar(said, shape.workflows * shape.calls)
                graph = agent(sessions, model.bind(max_tokens=shape.answer_tokens), tick=tick).compile()
                calls, _ = await play(graph if orla is None else orla.wrap(graph), sessions, threads=True)
        return Measured(arm.name, seed, calls, engine.peak_mib(), engine.files_mib())


# The command line -------------------------------------------------------------------------------------------


def options() -> argparse.Namespace:
    options = parser("slots", __doc__)
    add, known = options.add_argument, {arm.name: arm for arm in (*ARMS, *MORE)}
    add("--workflows", type=count, default=16, metavar="N", help="runs at a time (16)")
    add("--slots", type=count, default=4, metavar="N", help="of the engine (4)")
    add("--calls", type=count, default=4, metavar="N", help="of each workflow (4)")
    add("--tokens", type=count, default=700, metavar="N", help="of a workflow's first prompt, about (700)")
    add("--grow", type=whole, default=80, metavar="N", help="new tokens before each later call (80)")
    add("--answer-tokens", type=count, default=24, metavar="N", help="at most, of an answer (24)")
    add("--wait", type=amount, default=6.0, metavar="S", help="of the tools, on the mean; half to one and a half (6)")
    add("--arrive", type=amount, default=3.0, metavar="S", help="between the workflows' arrivals (3)")
    add("--cache-ram", type=whole, default=128, metavar="MIB", help="of stock's cache beside the slots (128)")
    add("--rounds", type=count, default=1, metavar="N", help="so many loads, each through all arms (1)")
    add("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=known, metavar="ARM", help=f"of {[*known]}")
    add("--threads", type=count, default=len(usable_cores()), metavar="N", help="of the engine (all cores)")
    add("--port", type=port, default=0, metavar="N", help="of the engine (a free one)")
    add("--keep", type=Path, metavar="FILE", help="write all calls there, as JSON")
    add("--write", action="store_true", help="write docs/slots.md and draw docs/slots.svg")
    args = options.parse_args()
    if args.calls < 2:
        options.error("--calls: at least 2, or no workflow returns")
    args.arms = [known[name] for name in args.arms]
    return args


def setting(args: argparse.Namespace) -> str:
    return (
        f"{args.workflows} workflows on {args.slots} slots, {args.calls} calls each; prompts begin with about "
        f"{args.tokens} tokens and grow by {args.grow} and an answer of {args.answer_tokens}; {args.wait:g} s "
        f"between calls on the mean; stock's RAM cache has {args.cache_ram} MiB; {args.rounds} "
        f"{'round' if args.rounds == 1 else 'rounds'}, {args.threads} threads."
    )


def main() -> int:
    args, turns = options(), list[Measured]()
    shape = Shape(**{each.name: getattr(args, each.name) for each in fields(Shape)})
    for seed in range(args.rounds):
        for arm in rotated(args.arms, seed):
            said = f"round {seed + 1}/{args.rounds}: {arm.name}"
            turns.append(asyncio.run(measure(arm, seed, shape, said)))
            if args.keep is not None:
                args.keep.write_text(json.dumps([asdict(turn) for turn in turns]), encoding="utf-8")
    tell("measured", last=True)
    names = [arm.name for arm in args.arms]
    found = Rounds(sorted(turns, key=lambda turn: names.index(turn.arm)))
    lines = [setting(args), "", *report(found), "", *(f"* {line}" for line in verdict(found))]
    print("\n".join(lines))
    if args.write:
        draw(found)
        put(PAGE, "slots", [*lines, "", f"![Time to the first token of calls that return]({DRAWING.name})"])
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "its engine is ended"))
