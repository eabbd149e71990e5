"""``orla-lg sim``: a simulated engine: ``up``, ``calibrate``, ``replay``."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orla_lg.errors import ConfigError, EngineError
from orla_lg_sim.parameters import EngineParameters, load

if TYPE_CHECKING:
    from orla_lg_sim.calibrate import CalibrationResult
    from orla_lg_sim.replay import CallOutcome
    from orla_lg_sim.sessions import Session

__all__ = ["register"]

UP = """\
Serve a simulated engine at an OpenAI-compatible URL on this machine: no model, no GPU, no downloads.

It schedules, batches, caches and evicts as vLLM does, takes as long as its parameters say, and answers with
words (or with JSON that follows the schema asked for). Ctrl-C ends it.

examples:
  orla-lg sim up                                      a small model on two CPU cores
  orla-lg sim up --parameters my-engine.toml          an engine that was calibrated
  orla-lg sim up --port 8200 --kv-tokens 8000         a cache under pressure
  orla-lg sim up --speed 10                           ten times as fast as the engine it stands for
"""
ORLA_TOML = """
orla.toml:
  [backends.{table}]
  url = "{url}"
  model = {model}
  engine = "sim"

  [mapping]
  "*" = {model}
"""
CALIBRATE = """\
Measure a live engine through its public API and write the parameters that make the simulation behave like it.

The engine should have nothing else to do meanwhile. Made-up prompts are sent: alone, after a known prefix,
beside a running stream, and many at once; it takes two or three minutes, with --quick half a minute.

examples:
  orla-lg sim calibrate --url http://127.0.0.1:8000/v1 --out my-engine.toml
  orla-lg sim calibrate --url http://127.0.0.1:8000/v1 --out my-engine.toml --quick
"""
REPLAY = """\
Replay multi-turn sessions against a live engine, against the simulation, or against both, and compare.

A session's next call is sent when the one before has ended and its thinking time has passed. Sessions are read
from a file of yours: JSON lines (or .jsonl.gz) with `session_id` and `messages` in OpenAI's form; the system
messages that a `prompt_ref` names are looked up in prompts_and_tools.json beside it. Each line:

  {"session_id": "a7", "messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}

With --arrivals instead: requests at the times of a trace, on the simulation only. JSON lines with `timestamp`,
`input_length`, `output_length` and `hash_ids` (Mooncake's form), or CSV with times and token counts (Azure's).

examples:
  orla-lg sim replay --sessions sessions.jsonl.gz --parameters my-engine.toml
  orla-lg sim replay --sessions sessions.jsonl.gz --url http://127.0.0.1:8000/v1
  orla-lg sim replay --sessions sessions.jsonl.gz --url http://127.0.0.1:8000/v1 \\
      --parameters my-engine.toml --tokenizer path/to/the/model
  orla-lg sim replay --arrivals conversations.jsonl.gz --parameters my-engine.toml --first 2000
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``sim`` with its own commands to the top parser."""
    sim = subparsers.add_parser("sim", help="a simulated engine, to test and to study with")
    commands = sim.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_up(_command(commands, "up", "serve a simulated engine", UP, _up))
    _register_calibrate(_command(commands, "calibrate", "measure a live engine", CALIBRATE, _calibrate))
    _register_replay(_command(commands, "replay", "replay sessions, live or simulated", REPLAY, _replay))


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    description: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    return command


def _register_up(up: argparse.ArgumentParser) -> None:
    add = up.add_argument
    add("--port", type=int, default=0, metavar="N", help="loopback port (default: a free one)")
    add("--parameters", type=Path, metavar="FILE", help="what `orla-lg sim calibrate` wrote, or TOML of your own")
    add("--kv-tokens", type=_positive, metavar="N", help="what the KV cache holds; overrides the file")
    add(
        "--model",
        default="sim",
        metavar="NAME",
        help="the model's name in requests, and the table's in orla.toml (sim)",
    )
    add("--speed", type=_rate, default=1.0, metavar="X", help="simulated seconds in a real one (1)")
    add("--seed", type=int, metavar="N", help="of answers and jitter; overrides the file")
    add("--tokenizer", type=Path, metavar="DIR", help="a model's folder, for its token counts and chat template")
    add("--answer-tokens", type=_positive, default=48, metavar="N", help="of a usual answer, where nothing says (48)")


def _register_calibrate(calibrate: argparse.ArgumentParser) -> None:
    add = calibrate.add_argument
    add("--url", required=True, metavar="URL", help="the engine's OpenAI-compatible base, usually ending in /v1")
    add("--out", required=True, type=Path, metavar="FILE", help="where to write the parameters")
    add("--model", metavar="NAME", help="default: the first that is served")
    add("--quick", action="store_true", help="fewer measurements")
    add("--base", type=Path, metavar="FILE", help="parameters to take what cannot be measured from")


def _register_replay(replay: argparse.ArgumentParser) -> None:
    add = replay.add_argument
    workload = replay.add_mutually_exclusive_group(required=True)
    workload.add_argument("--sessions", type=Path, metavar="FILE", help="JSON lines with messages")
    workload.add_argument("--arrivals", type=Path, metavar="FILE", help="a trace of times and lengths")
    add("--first", type=_positive, metavar="N", help="of --arrivals: no more than these")
    add("--url", metavar="URL", help="a live engine")
    add("--parameters", type=Path, metavar="FILE", help="simulate an engine with these parameters")
    add("--tokenizer", type=Path, metavar="DIR", help="the model's folder, so that the simulation counts as it does")
    add("--kv-tokens", type=_positive, metavar="N", help="what the simulated cache holds; overrides the file")
    add("--count", type=_positive, default=8, metavar="N", help="sessions (8)")
    add("--turns", type=_positive, default=8, metavar="N", help="calls of each at most (8)")
    add("--think", type=float, default=1.0, metavar="S", help="mean seconds between a call's end and the next (1)")
    add("--every", type=float, default=2.0, metavar="S", help="mean seconds between begins of sessions (2)")
    add("--longest", type=_positive, default=12_000, metavar="CHARS", help="longest prompt (12000 characters)")
    add("--seed", type=int, default=0, metavar="N", help="of the times")


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def _rate(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if value <= 0:
        raise argparse.ArgumentTypeError(f"must be a positive number, got {text!r}")
    return value


def _parameters(args: argparse.Namespace) -> EngineParameters:
    found = load(args.parameters) if args.parameters else EngineParameters()
    if args.kv_tokens:
        found = replace(found, kv_blocks=max(1, args.kv_tokens // found.block_tokens))
    return found


# up


def _up(args: argparse.Namespace) -> int:
    with _needs_extra():
        from orla_lg_sim.chat import ChatReader
        from orla_lg_sim.server import LOOPBACK, SimService, listen, server_of
    from orla_lg_sim.text import tokenizer_of

    parameters = _parameters(args)
    if args.seed is not None:
        parameters = replace(parameters, seed=args.seed)
    reader = ChatReader(args.model, parameters, tokenizer_of(args.tokenizer), args.answer_tokens)
    listening = listen(args.port)
    url = f"http://{LOOPBACK}:{listening.getsockname()[1]}/v1"
    print(f"simulated engine {args.model!r} at {url}; {parameters.kv_tokens} tokens of KV cache; Ctrl-C ends it")
    model = json.dumps(args.model)
    table = args.model if re.fullmatch(r"[A-Za-z0-9_-]+", args.model) else model
    print(ORLA_TOML.format(url=url, table=table, model=model), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(server_of(SimService(reader, parameters, args.speed)).serve(sockets=[listening]))
    return 0


@contextlib.contextmanager
def _needs_extra() -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise EngineError(f"{error.name} is missing; `orla-lg sim` needs: pip install 'orla-lg[sim]'") from error


# calibrate


def _calibrate(args: argparse.Namespace) -> int:
    from orla_lg_sim.calibrate import QUICK, Calibrator, Effort
    from orla_lg_sim.client import TimingClient

    base = load(args.base) if args.base else EngineParameters()

    async def measure() -> CalibrationResult:
        client = TimingClient(args.url, args.model)
        try:
            with _bar(f"measuring {args.url}") as tell:
                return await Calibrator(client, QUICK if args.quick else Effort(), tell).run(base)
        finally:
            await client.aclose()

    found = asyncio.run(measure())
    found.parameters.save(args.out)
    _print_calibration(found)
    print(f"written to {args.out}; try it: orla-lg sim up --parameters {args.out}")
    return 0


def _print_calibration(found: CalibrationResult) -> None:
    limits = found.parameters
    print(
        f"model {found.model}: {limits.kv_blocks} blocks of {limits.block_tokens} tokens, {limits.max_running} seats,"
    )
    print(f"  {limits.max_batch_tokens} tokens in a step, context {limits.context_tokens}")
    for name in sorted({name for one in found.samples for name in one.terms}):
        print(f"  {name:<20} {getattr(limits, name) * 1e6:>12.3f} µs")
    print("error of the fit (median):")
    for what, error in found.errors.items():
        print(f"  {what:<20} {error:>11.1%}   {sum(one.what == what for one in found.samples)} measurements")
    for note in found.notes:
        print(f"note: {note}")


# replay


def _replay(args: argparse.Namespace) -> int:
    from orla_lg_sim.replay import VirtualReplay, table
    from orla_lg_sim.sessions import Shape, read
    from orla_lg_sim.text import tokenizer_of

    if args.arrivals:
        return _replay_arrivals(args)
    if not (args.url or args.parameters):
        print("orla-lg sim replay: say what to replay against: --url, --parameters, or both", file=sys.stderr)
        return 2
    shape = Shape(
        sessions=args.count,
        turns=args.turns,
        begin_every_s=args.every,
        think_s=args.think,
        longest_chars=args.longest,
        seed=args.seed,
    )
    sessions = read(args.sessions, shape)
    columns: dict[str, list[CallOutcome]] = {}
    if args.url:
        columns["live"] = asyncio.run(_live(args.url, sessions))
    if args.parameters:
        tokenizer = tokenizer_of(args.tokenizer)
        columns["simulated"] = VirtualReplay(sessions, _parameters(args), tokenizer).run()
    print(table(columns))
    return 0


def _replay_arrivals(args: argparse.Namespace) -> int:
    from orla_lg_sim import arrivals
    from orla_lg_sim.engine import SimEngine
    from orla_lg_sim.replay import table

    if args.url:
        print("orla-lg sim replay: --arrivals has no texts to send to --url", file=sys.stderr)
        return 2
    parameters = _parameters(args)
    found = arrivals.read(args.arrivals, parameters, args.first)
    if found.too_long:
        print(f"{found.too_long} requests have more than {parameters.longest_tokens} tokens and are left out")
    if not found.arrivals:
        raise ConfigError(f"no request in {args.arrivals} fits into {parameters.longest_tokens} tokens")
    engine = SimEngine(parameters)
    print(table({"simulated": arrivals.run(found.arrivals, engine)}))
    state = engine.state()
    print(f"{state.steps} steps, {state.preemptions} preemptions, {state.evictions} cached blocks evicted")
    return 0


async def _live(url: str, sessions: list[Session]) -> list[CallOutcome]:
    from orla_lg_sim.client import TimingClient
    from orla_lg_sim.replay import live

    client, calls = TimingClient(url), sum(len(session.turns) for session in sessions)
    try:
        await client.served()
        with _bar(f"replaying at {url}") as tell:
            return await live(sessions, client, lambda done: tell("calls", done, calls))
    finally:
        await client.aclose()


# A bar


@contextlib.contextmanager
def _bar(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """Show on a terminal how far something is; elsewhere nothing."""
    try:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        yield lambda *_: None
        return
    columns: tuple[Any, ...] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[what]}"),
    )
    from rich.console import Console

    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(title, total=None, what="")
        yield lambda what, done, total: bar.update(task, completed=done, total=total, what=what)
