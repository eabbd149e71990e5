"""Twelve agents and a KV cache for five: bare, with engine priority, under fixed caps, wrapped, and with the plugin.

    make bench-pressure BENCH='--sessions-file sessions.jsonl.gz'      starts its own vLLM on the CPU; half an hour
    python -m bench.pressure --url http://127.0.0.1:8000/v1            an engine that runs already (see below)
    python -m bench.pressure --simulate --parameters engine.toml       in virtual time, some seconds
    python -m bench.pressure --help

docs/pressure.md has the load, the arms and the figures. Texts are those of a trace that you have (--sessions-file,
JSON lines with `messages`, `prompt_ref`, `tools_ref`), or made up. The arm *no eviction* (with --simulate only) has a
pool in which everything stays. The plugin is judged by --arms bare bare_again wrapped plugin plugin+admission, and by
the same with --blocks 600, where all fits.

An engine of your own must be vLLM, used by nothing else, started with VLLM_SERVER_DEV_MODE=1 and
--num-gpu-blocks-override 240 --block-size 32 --enable-prompt-tokens-details --scheduling-policy priority, and with
the plugin for its arms (`orla-lg engine up vllm-cpu --plugin --kv-tokens 7680` does all that).
A run that is stopped (Ctrl-C) goes on from its last turn when it is started again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench.lib.calls import Turn
from bench.lib.command import DOCS, ended, parser, put, tell, usual
from bench.lib.engines import VLLM, engine_at
from bench.lib.flags import count, share
from bench.lib.kept import Kept
from bench.pressure.arms import ARMS, BARE, ENDLESS, Arm, Figures, draw, recorded
from bench.pressure.live import live_turn
from bench.pressure.simulated import SimulatedTurns
from bench.pressure.workflows import Load, LocalWords, Material, Shape, from_trace, load_of, made_up, tool_times
from orla_lg.engines import EngineOptions
from orla_lg_sim.parameters import EngineParameters, load
from orla_lg_sim.text import tokenizer_of

BLOCK_TOKENS, BLOCKS = 32, 240


def load_from(args: argparse.Namespace) -> tuple[Material, Shape]:
    """Return what sessions are cut from, and how many and how long."""
    shape = Shape(args.sessions, history_tokens=args.history_tokens, answer_tokens=args.answer_tokens)
    if args.latency_file:
        shape = replace(shape, tool_s=tool_times(args.latency_file))
    if args.sessions_file:
        return from_trace(args.sessions_file, args.prompts_file), shape
    return made_up(args.sessions, args.history_tokens), shape


def simulated(args: argparse.Namespace, arms: Sequence[Arm]) -> Figures:
    given = load(args.parameters) if args.parameters else EngineParameters()
    parameters = replace(given, kv_blocks=args.blocks, block_tokens=BLOCK_TOKENS, keep_whole=args.keep_whole)
    words, (material, shape) = LocalWords(tokenizer_of(args.tokenizer)), load_from(args)
    turns, made = SimulatedTurns(parameters, words), list[Turn]()
    for seed in range(args.seeds):
        sessions = load_of(material, shape, words, seed)
        for arm in arms:
            tell(f"seed {seed}: {arm.name}")
            made.append(turns.turn(recorded(arm, args.records, seed), sessions))
    tell("simulated", last=True)
    return Figures(made, BLOCK_TOKENS, args.blocks * BLOCK_TOKENS)


def measure(args: argparse.Namespace, engine: VLLM, arms: Sequence[Arm]) -> Kept:
    """Run every turn that is not kept yet."""
    material, shape = load_from(args)
    source = args.sessions_file.name if args.sessions_file else "made up"
    pool = {"blocks": engine.blocks, "block_tokens": engine.block_tokens, "model": engine.model}
    same = {**asdict(shape), "tool_s": list(shape.tool_s), "source": source, **pool, "plugin": engine.has_plugin}
    kept = Kept(args.keep, same)

    def sessions(seed: int) -> Load:
        return load_of(material, shape, engine, seed)

    def turn(arm: Arm, given: Load, seed: int) -> Coroutine[Any, Any, Turn]:
        return live_turn(engine, recorded(arm, args.records, seed), given)

    asyncio.run(kept.measure(engine.url, arms, args.seeds, sessions, turn, quiet=args.quiet))
    return kept


def live(args: argparse.Namespace, arms: Sequence[Arm]) -> Figures:
    """Return the figures of the turns that are kept, after measuring what is missing."""
    if args.again:
        kept = Kept(args.keep, {})
    else:
        plugin = any(arm.plugin for arm in arms)
        options = EngineOptions("vllm-cpu", kv_tokens=args.blocks * BLOCK_TOKENS, plugin=plugin)
        with engine_at(options, args.url) as engine:
            kept = measure(args, engine, arms)
    names, block_tokens = [arm.name for arm in arms], kept.settings["block_tokens"]
    turns = [turn for turn in kept.turns if turn.arm in names]
    return Figures(turns, block_tokens, kept.settings["blocks"] * block_tokens, names)


def options() -> argparse.Namespace:
    options = parser("pressure", __doc__)
    add = options.add_argument
    add("--sessions", type=count, default=12, metavar="N", help="agents (12; 4 fit: ours must change nothing)")
    add("--seeds", type=count, default=5, metavar="N", help="so many loads, each through all arms (5)")
    add("--sessions-file", type=Path, metavar="FILE", help="agent sessions with messages, JSON lines, .gz or not")
    add("--prompts-file", type=Path, metavar="FILE",
        help="the `prompts` and `tools` they refer to (prompts_and_tools.json beside them)")  # fmt: skip
    add("--latency-file", type=Path, metavar="FILE",
        help="median and 90th percentile of the tools' times, per_step_s.tool_execution (0.1 and 10 s)")  # fmt: skip
    add("--history-tokens", type=count, default=2100, metavar="N", help="what a session grows to, on the mean (2100)")
    add("--answer-tokens", type=count, default=24, metavar="N", help="every answer (24)")
    add("--blocks", type=count, default=BLOCKS, metavar="N", help="of 32 tokens, in our own engine's pool (240)")
    add("--arms", nargs="+", metavar="ARM", help="only these; bare must be one of them")
    add("--url", help="a vLLM that runs already")
    add("--quiet", type=share, default=0.1, metavar="SHARE",
        help="repeat a turn, once, in which other processes took more of the machine (0.1)")  # fmt: skip
    add("--again", action="store_true", help="measure nothing, take what is kept")
    add("--simulate", action="store_true", help="in virtual time, on the simulated engine")
    add("--parameters", type=Path, metavar="FILE", help="what `orla-lg sim calibrate` wrote, for --simulate")
    add("--keep-whole", type=share, default=0.0, metavar="SHARE",
        help="with --simulate: the plugin suspends whole workflows, so much of the pool spare (0: no)")  # fmt: skip
    add("--tokenizer", type=Path, metavar="FOLDER", help="the model's, for --simulate (made up: about 4 characters)")
    add("--records", type=Path, metavar="FOLDER", help="write records there, for `orla-lg replay`")
    usual(options, keep="pressure.json", writes="docs/pressure.md and docs/pressure.svg")
    args = options.parse_args()
    known = [arm.name for arm in (*ARMS, ENDLESS)]
    if args.arms and (BARE not in args.arms or not {*args.arms} <= {*known}):
        options.error(f"--arms: {BARE} and any of {', '.join(known)}")
    if args.sessions_file and not args.prompts_file:
        args.prompts_file = args.sessions_file.with_name("prompts_and_tools.json")
    return args


def main() -> int:
    args = options()
    arms = [arm for arm in (*ARMS, *([ENDLESS] if args.simulate else [])) if not args.arms or arm.name in args.arms]
    figures = simulated(args, arms) if args.simulate else live(args, arms)
    lines, drawing = [figures.setting(), "", *figures.table()], []
    print("\n".join([*lines, *figures.verdict()]))
    if args.write:
        how = "simulated" if args.simulate else "live"
        kind = "all fit" if figures.fits else f"{figures.sessions} sessions"
        if not args.simulate and not figures.fits and figures.sessions == Shape.sessions:
            draw(figures, DOCS / "pressure.svg")
            drawing = ["", "![Each arm against the bare engine](pressure.svg)"]
        put(DOCS / "pressure.md", f"pressure: {how}, {kind}", [*lines, *drawing])
    return 0


if __name__ == "__main__":
    sys.exit(ended(main, "the same command goes on with the turn that was broken off"))
