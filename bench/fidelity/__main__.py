"""How near the simulation is to the engine it was calibrated on: the same sessions on both, side by side.

    orla-lg sim calibrate --url http://127.0.0.1:8000/v1 --out engine.toml
    python -m bench.fidelity --sessions sessions.jsonl.gz --parameters engine.toml \\
        --tokenizer MODEL_FOLDER --url http://127.0.0.1:8000/v1 --tight-url http://127.0.0.1:8001/v1

Both engines serve the same model; the second was started with a small KV cache (vLLM: --num-gpu-blocks-override).
Each round replays other sessions of the file, with an empty cache at its begin. Arrivals, thinking times, prompts
and lengths of answers are the same on both sides, and a session's next call follows the end of the one before.
Run it alone: on a machine that does something else the engine is measured with it.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench.lib import plot
from bench.lib.calls import Turn
from bench.lib.command import DOCS, ended, finish, parser, usual
from bench.lib.figures import table
from bench.lib.flags import above_zero, amount, count, share
from bench.lib.kept import Kept
from orla_lg.openai_api.metrics import samples
from orla_lg_sim.client import TimingClient
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.replay import CallOutcome, VirtualReplay, live, summarise
from orla_lg_sim.sessions import Session, Shape, read
from orla_lg_sim.text import Tokenizer, tokenizer_of

GOAL_TIME, GOAL_CACHED = 0.15, 0.05
HELLO = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}


@dataclass(frozen=True, slots=True)
class Arm:
    """One live engine."""

    name: str
    url: str

    async def replay(self, sessions: list[Session], seed: int) -> Turn:
        """Replay a round's sessions from an empty cache."""
        client = TimingClient(self.url)
        try:
            await client.served()
            labels = next(labels for labels, _ in samples(await client.metrics(), "vllm:cache_config_info"))
            for _ in range(2):  # the first calls after a pause are slower
                await client.ask(HELLO)
            if not await client.forget_everything():
                raise SystemExit(
                    f"{self.url} does not let its cache be emptied; start it with VLLM_SERVER_DEV_MODE=1"
                )
            outcomes = [asdict(outcome) for outcome in await live(sessions, client)]
        finally:
            await client.aclose()
        more = {"kv_blocks": int(labels["num_gpu_blocks"]) - 1, "outcomes": outcomes}
        return Turn(self.name, seed, 0, [], [], more=more)


@dataclass(frozen=True, slots=True)
class Both:
    """The same sessions on an engine, live and simulated."""

    name: str
    kv_blocks: int
    live: list[CallOutcome]
    simulated: list[CallOutcome]


def sessions_of(args: argparse.Namespace, number: int) -> list[Session]:
    shape = Shape(args.count, number * args.count, args.turns, args.every, args.think, args.longest, seed=number)
    return read(args.sessions, shape)


def measure(args: argparse.Namespace) -> Kept:
    """Replay live what is not kept yet."""
    names = ("rounds", "count", "turns", "every", "think", "longest")
    kept = Kept(args.keep, {} if args.again else {name: getattr(args, name) for name in names})
    for name, url in (("no pressure", args.url), ("pressure", args.tight_url)):
        if url and not args.again:
            rounds = kept.measure(
                url, [Arm(name, url)], args.rounds, lambda seed: sessions_of(args, seed), Arm.replay, quiet=args.quiet
            )
            asyncio.run(rounds)
    return kept


def beside(
    args: argparse.Namespace, turns: Sequence[Turn], parameters: EngineParameters, tokenizer: Tokenizer
) -> list[Both]:
    """Replay on the simulation what was replayed live."""
    found: dict[str, Both] = {}
    for turn in sorted(turns, key=lambda turn: turn.seed):
        same = replace(parameters, kv_blocks=turn.more["kv_blocks"])
        both = found.setdefault(turn.arm, Both(turn.arm, same.kv_blocks, [], []))
        both.live.extend(CallOutcome(**row) for row in turn.more["outcomes"])
        both.simulated.extend(VirtualReplay(sessions_of(args, turn.seed), same, tokenizer).run())
    return list(found.values())


def rows(arms: Sequence[Both]) -> list[str]:
    lines = []
    for arm in arms:
        real, ours = summarise(arm.live), summarise(arm.simulated)
        where = f"{arm.name}, {arm.kv_blocks} blocks"
        for title, a, b, unit, goal in (
            ("TTFT, median", real.ttft_s * 1e3, ours.ttft_s * 1e3, " ms", GOAL_TIME),
            ("completion, median", real.duration_s * 1e3, ours.duration_s * 1e3, " ms", GOAL_TIME),
            ("TTFT, mean", real.mean_ttft_s * 1e3, ours.mean_ttft_s * 1e3, " ms", None),
            ("completion, mean", real.mean_duration_s * 1e3, ours.mean_duration_s * 1e3, " ms", None),
            ("cached tokens", real.cached_tokens, ours.cached_tokens, "", GOAL_CACHED),
        ):
            off = f"{b / a - 1:+.1%}"
            if goal is not None:
                off = f"**{off}**" if abs(b / a - 1) <= goal else f"**{off}** (goal missed)"
            lines.append([where, title, f"{a:,.0f}{unit}", f"{b:,.0f}{unit}", off])
    return table(["cache", "figure", "vLLM", "simulated", "difference"], lines)


def draw(arms: Sequence[Both]) -> None:
    size = (8, 2.6 * len(arms))
    figure, axes = plot.pyplot("orla_lg", 9, text=True).subplots(
        len(arms), 2, figsize=size, squeeze=False, layout="constrained"
    )
    titles = {"ttft_s": "time to first token", "duration_s": "completion"}
    for row, arm in zip(axes, arms, strict=True):
        for axis, (what, title) in zip(row, titles.items(), strict=True):
            for outcomes, label, style in ((arm.live, "vLLM", "-"), (arm.simulated, "simulated", "--")):
                plot.shares(axis, [getattr(outcome, what) for outcome in outcomes], label, ls=style)
            named = {"title": f"{title}, {arm.name}", "xlabel": "seconds", "ylabel": "part of calls"}
            axis.set(**named, xscale="log", ylim=(0, 1))
            axis.grid(alpha=0.3, which="both")
            axis.legend()
    plot.save(figure, DOCS / "sim-fidelity.svg", tight=None)


def options() -> argparse.Namespace:
    options = parser("fidelity", __doc__)
    add = options.add_argument
    add("--sessions", required=True, type=Path, help="JSON lines with messages, .gz or not")
    add("--parameters", required=True, type=Path, help="what `orla-lg sim calibrate` wrote")
    add("--tokenizer", required=True, type=Path, help="the model's folder")
    add("--url", help="the live engine")
    add("--tight-url", help="the same with a small KV cache")
    add("--again", action="store_true", help="take the live measurements kept before; simulate and draw only")
    add("--quiet", type=share, default=0.05, help="repeat a round, once, beside which others took more (0.05)")
    add("--count", type=count, default=10, help="sessions in a round (10)")
    add("--turns", type=count, default=8, help="calls of each at most (8)")
    add("--every", type=above_zero, default=1.0, help="mean seconds between begins of sessions (1)")
    add("--think", type=amount, default=1.0, help="mean seconds between a call's end and the next (1)")
    add("--longest", type=count, default=12_500, help="longest prompt in characters")
    usual(options, rounds=3, keep="sim-fidelity.json", writes="docs/simulation.md and its figure")
    return options.parse_args()


def main() -> int:
    args = options()
    turns = measure(args).turns
    if not (arms := beside(args, turns, load(args.parameters), tokenizer_of(args.tokenizer))):
        raise SystemExit(f"{args.keep} holds no live measurements; give --url, --tight-url, or both")
    setting = (
        f"{len(arms[0].live)} calls of {args.rounds * args.count} sessions in {args.rounds} rounds, on each engine. "
        f"Other processes took {max(turn.others for turn in turns):.0%} of the machine in the worst round."
    )
    if args.write:
        draw(arms)
    return finish([setting, "", *rows(arms)], "fidelity", DOCS / "simulation.md" if args.write else None)


if __name__ == "__main__":
    sys.exit(ended(main, "the same command goes on with the round that was broken off"))
