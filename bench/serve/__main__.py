"""What ``orla-lg serve`` adds: the link to a core in the process itself, the gateway to the engine, beside LiteLLM.

    make bench-serve                         all of it, some ten minutes; run it alone
    make bench-serve BENCH='--quick'         two minutes, as a first look
    make bench-serve BENCH='--memory'        memory over 200,000 requests and 1,000 open streams (five minutes)
    make bench-serve BENCH='--write'         draws docs/serve.svg too
    python -m bench.serve --help

The engine is a script in a process of its own that answers at once. The server under test has one core to itself;
the engine and all callers have the other. Arms are interleaved in rounds; a figure is the median over rounds, with
the extremes. LiteLLM's proxy comes from its package, into an environment of its own in the user's cache folder
(600 MB, once), and stands still while another arm has its turn.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.lib import plot
from bench.lib.command import DOCS, ended, parser, usual
from bench.lib.figures import Rounds, spread
from bench.serve import gateway, link
from bench.serve.servers import cores


def draw(blocks: Sequence[link.Block], rounds: Rounds[gateway.Turn], path: Path) -> None:
    """Draw what is added and what it costs, with the goals."""
    panes = plot.pyplot("serve").subplots(1, 3, figsize=(9.5, 1.9))[1]
    arms = [arm for arm in rounds.arms if arm != gateway.DIRECT]
    shown: list[tuple[str, dict[str, Any], float]] = [
        ("link: added to the wait, ms",
         {load: spread(link.added(blocks, load)) for load in (link.LOADED, link.IDLE)}, link.GOAL_MS),
        ("gateway: added at the median, ms",
         {arm: spread(rounds.column(arm, lambda turn: turn.added_ms)) for arm in arms[::-1]}, gateway.GOAL_ADDED_MS),
        ("gateway: CPU per request, ms",
         {arm: spread(rounds.column(arm, lambda turn: turn.cpu_ms)) for arm in arms[::-1]}, gateway.GOAL_CPU_MS),
    ]  # fmt: skip
    for axes, (title, rows, goal) in zip(panes, shown, strict=True):
        plot.bars(axes, rows, ["#e08a3c", "#3b7dd8"][-len(rows) :], goal, "#777")
        axes.set_title(f"{title} (dashed: goal)", fontsize=8)
    plot.open_axes(*panes)
    plot.save(panes[0].figure, path)


def main() -> int:
    options = parser("serve", __doc__)
    usual(options, rounds=7, writes="docs/serve.svg")
    add = options.add_argument
    add("--quick", action="store_true", help="three rounds of a quarter")
    add("--memory", action="store_true", help="memory alone")
    add("--no-litellm", action="store_true", help="leave LiteLLM out")
    args = options.parse_args()
    os.sched_setaffinity(0, {cores()[1]})  # what is started here inherits it
    if args.memory:
        few = 10 if args.quick else 1
        print("\n".join(asyncio.run(gateway.memory(200_000 // few, 1_000 // few))))
        return 0
    rounds, part = (3, 4) if args.quick else (args.rounds, 1)
    blocks = link.measure(rounds, 400 // part)
    print("\n".join(link.report(blocks)), end="\n\n", flush=True)
    turns = asyncio.run(gateway.measure(rounds, 4_000 // part, not args.no_litellm))
    missed = [*link.beyond_goal(blocks), *gateway.beyond_goal(turns)]
    print("\n".join([*turns.table("through", gateway.COLUMNS), "", *(missed or ["within the goals"])]))
    if args.write:
        draw(blocks, turns, DOCS / "serve.svg")
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "nothing was written"))
