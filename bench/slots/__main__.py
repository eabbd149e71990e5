"""More workflows than slots on a real llama.cpp: what those that come back wait for, bare and wrapped.

    make bench-slots                              all arms, one round: some ten minutes on two quiet cores
    python -m bench.slots --rounds 5 --write      what docs/slots.md shows
    python -m bench.slots --workflows 6 --slots 2 --calls 3 --tokens 200 --cache-ram 12         a first look

    stock, stock again    ChatOpenAI against llama.cpp with its default flags and a RAM cache of --cache-ram MiB, in
                          which some of the workflows without a slot have room; twice, to show the noise
    orla                  the same graph wrapped; the engine without RAM cache, with a folder to save slots to
    orla, as many bytes   its files together no larger than the RAM cache of stock   (with --arms)
    stock, all the room   a RAM cache for all: what memory without end would do (with --arms)

Each turn gets an engine of its own; every round runs all arms on the same load, in changing order. Times are taken by
the node from its call to the first token, queues included; a workflow's first call counts for the makespan only.
Goals: p95 of those that return at least 3 times shorter, p50 no longer.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from bench.lib.calls import Turn
from bench.lib.command import DOCS, bar, ended, finish, parser, usual
from bench.lib.figures import Rounds
from bench.lib.flags import amount, count, folds, port, whole
from bench.lib.kept import Kept
from bench.lib.workflows import Session, agent, turn_of
from bench.slots.workflows import AGAIN, ORLA, STOCK, Arm, Shape, draw, engine_for, report, sessions_of, verdict
from orla_lg import Backend
from orla_lg_llamacpp.embedded import usable_cores

ARMS = (Arm(STOCK), Arm(AGAIN), Arm(ORLA, {}, bounded=False))
MORE = (Arm("orla, as many bytes", {}), Arm("stock, all the room", bounded=False))


async def measure(arm: Arm, sessions: Sequence[Session], seed: int, shape: Shape) -> Turn:
    """Run one arm on an engine of its own, with a bar."""
    files = shape.cached_workflows if arm.bounded else 2 * shape.workflows
    with engine_for(arm, shape) as engine:
        backend = Backend("llama", engine.url, model=engine.model, engine="llamacpp", max_saved=files)
        tick = bar(f"round {seed + 1}: {arm.name}", shape.workflows * shape.calls)

        def graph(model: Any) -> Any:
            return agent(sessions, model.bind(max_tokens=shape.answer_tokens), tick=tick).compile()

        turn = await turn_of(
            arm, engine, backend, sessions, graph, seed=seed, mapper={"*": "llama"}, fresh=True, threads=True
        )
        return replace(turn, more={"peak_mib": engine.peak_mib(), "files_mib": engine.files_mib()})


def options() -> argparse.Namespace:
    options = parser("slots", __doc__)
    add, known = options.add_argument, {arm.name: arm for arm in (*ARMS, *MORE)}
    add("--workflows", type=count, default=16, metavar="N", help="runs at a time (16)")
    add("--slots", type=count, default=4, metavar="N", help="of the engine (4)")
    add("--calls", type=folds, default=4, metavar="N", help="of each workflow (4)")
    add("--tokens", type=count, default=700, metavar="N", help="of a workflow's first prompt, about (700)")
    add("--grow", type=whole, default=80, metavar="N", help="new tokens before each later call (80)")
    add("--answer-tokens", type=count, default=24, metavar="N", help="at most, of an answer (24)")
    add("--wait", type=amount, default=6.0, metavar="S", help="of the tools, on the mean; half to one and a half (6)")
    add("--arrive", type=amount, default=3.0, metavar="S", help="between the workflows' arrivals (3)")
    add("--cache-ram", type=whole, default=128, metavar="MIB", help="of stock's cache beside the slots (128)")
    add("--arms", nargs="+", default=[arm.name for arm in ARMS], choices=known, metavar="ARM", help=f"of {[*known]}")
    add("--threads", type=count, default=len(usable_cores()), metavar="N", help="of the engine (all cores)")
    add("--port", type=port, default=0, metavar="N", help="of the engine (a free one)")
    usual(options, rounds=1, keep="", writes="docs/slots.md and docs/slots.svg")
    args = options.parse_args()
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
    args = options()
    shape = Shape(**{each.name: getattr(args, each.name) for each in fields(Shape)})
    kept = Kept(args.keep, asdict(shape))

    def load(seed: int) -> list[Session]:
        return sessions_of(shape, seed)

    def turn(arm: Arm, sessions: list[Session], seed: int) -> Coroutine[Any, Any, Turn]:
        return measure(arm, sessions, seed, shape)

    asyncio.run(kept.measure(None, args.arms, args.rounds, load, turn))
    found = Rounds(kept.turns, [arm.name for arm in args.arms])
    lines = [setting(args), "", *report(found), "", *(f"* {line}" for line in verdict(found))]
    drawing = ["", "![Time to the first token of calls that return](slots.svg)"]
    if args.write:
        draw(found, DOCS / "slots.svg")
    return finish(lines, "slots", DOCS / "slots.md" if args.write else None, drawing)


if __name__ == "__main__":
    sys.exit(ended(main, "its engine is ended"))
