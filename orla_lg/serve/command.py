"""``orla-lg serve`` and ``orla-lg reload``."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import FrameType
from typing import Any

import httpx

from orla_lg import config
from orla_lg.core.boundary.plain import counted
from orla_lg.core.policies import DEFAULT_STAGE, name_of
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.demo.engine import demo_engine
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaError
from orla_lg.openai_api.adapter import PLAIN_WIRES
from orla_lg.orla import Orla
from orla_lg.serve.settings import DEFAULT_PORT, LOOPBACK, UNIX, ServeSettings, settings

SERVE = f"""\
Run one core for many processes: LangGraph applications reach it by Orla.remote(...), everything else by the OpenAI
and Anthropic APIs. What waits is ordered, and what is bounded holds, over all of them.

Without a configuration it starts with no engine behind it, and is healthy at once.

examples:
  orla-lg serve --demo                    with an engine of its own, to see it answer
  orla-lg serve --config orla.toml        your engines
  orla-lg serve --port 9000               on http://{LOOPBACK}:9000 instead of {DEFAULT_PORT}; 0: a free port
  orla-lg serve --listen-address unix:/run/user/1000/orla.sock
  orla-lg serve --listen-address 0.0.0.0:8081    for other machines: needs a key (orla-lg keys create), and
                                          [serve] tls_cert and tls_key, or behind_proxy = true

SIGTERM or Ctrl-C: new calls are refused (503), those under way have [serve] drain_s seconds (30), a second one ends
at once. SIGHUP, or `orla-lg reload`: the configuration is loaded again.

exit status: 0 drained and ended; 1 something is wrong with its configuration or its port, or it was cut short
"""

RELOAD = """\
Have a running `orla-lg serve` load its configuration again, and print what changed. Calls go on. A file that is
wrong, or asks for what needs a restart, changes nothing.

What changes while it runs: backends added and removed, their max_concurrency, capacity, cost and quality; the
mapping, variants and load_aware; policies; limits.

examples:
  orla-lg reload --dry-run          what would change
  orla-lg reload                    change it
  orla-lg reload --server http://10.0.0.5:8081 --key "$ORLA_SERVER_KEY"

exit status, with --dry-run too: 0 it was loaded, or can be; 1 nothing was changed, or would be: the file is wrong or
asks for what needs a restart, or no server answers
"""

EXTRA = (
    "aiohttp", "httptools", "orjson", "starlette", "uvicorn", *(() if sys.platform == "win32" else ("uvloop",))
)  # fmt: skip
INSTALL = "pip install 'orla-lg[serve]'"
RELOAD_PATIENCE_S = 60.0
WITHHELD = (
    f"; the key in {config.SERVER_KEY} was not sent, since this is neither the server in {config.SERVER} nor one on "
    "this machine: --key gives it"
)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the top parser."""
    form = argparse.RawDescriptionHelpFormatter
    serve = subparsers.add_parser(
        "serve", help="one core for many processes, with a gateway", description=SERVE, formatter_class=form
    )
    serve.add_argument(
        "--config",
        metavar="FILE",
        help="the configuration (default: ORLA_CONFIG, else the nearest orla.toml, else none)",
    )
    where = serve.add_mutually_exclusive_group()
    where.add_argument(
        "--listen-address", metavar="HOST:PORT", help=f"or {UNIX}PATH (default {LOOPBACK}:{DEFAULT_PORT})"
    )
    where.add_argument("--port", type=_port, metavar="N", help=f"the same as --listen-address {LOOPBACK}:N")
    serve.add_argument("--store", metavar="FILE", help="what outlives the process (default: in your state folder)")
    serve.add_argument("--demo", action="store_true", help="start a small engine too, and serve that")
    serve.set_defaults(run=run_serve)
    reload = subparsers.add_parser(
        "reload", help="have a running server load its configuration again", description=RELOAD, formatter_class=form
    )
    reload.add_argument("--dry-run", action="store_true", help="only say what would change")
    reload.add_argument(
        "--config", metavar="FILE", help="whose [serve] says where the server listens (default: as for serve)"
    )
    reload.add_argument("--server", metavar="URL", help="the server (default: ORLA_SERVER, else what [serve] says)")
    reload.add_argument(
        "--key",
        help="a key of scope control, where the server has keys (default: ORLA_SERVER_KEY, for the server in "
        "ORLA_SERVER and those on this machine)",
    )
    reload.set_defaults(run=run_reload)


def _port(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 65_536):
        raise argparse.ArgumentTypeError(f"it is {text!r}; it must be a port: 1 to 65535, or 0 for a free one")
    return int(text)


# serve


def run_serve(args: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit status."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"orla-lg serve needs {', '.join(missing)}, which a plain install leaves out: {INSTALL}")
    if args.demo and args.config:
        raise ConfigError("--demo serves an engine of its own, --config those of a file; give one of them")
    chosen = settings(args.config, args.listen_address, args.port, args.store, reads_file=not args.demo)
    with contextlib.ExitStack() as ending:
        ending.enter_context(_ended_in_order())
        if args.demo:
            chosen = replace(chosen, core=ending.enter_context(demo_engine()))
        return _serve(chosen, ending, is_demo=args.demo)


def _serve(chosen: ServeSettings, ending: contextlib.ExitStack, *, is_demo: bool) -> int:
    # What the extra brings is imported here: the command line starts without it.
    from orla_lg.serve.keys import PREFIX
    from orla_lg.serve.listening import Listening
    from orla_lg.serve.recognition import refuse_our_own
    from orla_lg.serve.server import opened_store, run

    store = opened_store(chosen, in_memory=is_demo)
    ending.callback(getattr(store, "close", int))
    keys = len(store.scan(PREFIX))
    chosen.check(has_keys=bool(keys))
    opened = Listening(chosen.listen)
    ending.callback(opened.close)
    with ThreadPoolExecutor() as asking:
        list(asking.map(refuse_our_own, chosen.core.backends))
    orla = Orla.from_settings(chosen.core, may_be_empty=True)
    ending.callback(orla.close)
    silent = orla.connect()
    logging.basicConfig(level=logging.WARNING, format="orla-lg serve: %(message)s")

    def started(url: str) -> None:
        print("\n".join(_started(chosen, orla, silent, keys, url, is_demo=is_demo)), flush=True)

    gc.collect()
    gc.freeze()  # what the imports made stays: the collector need not look through it at every few hundred calls
    return run(chosen, orla, store, opened, started)


@contextlib.contextmanager
def _ended_in_order() -> Iterator[None]:
    """Have SIGTERM end the start as Ctrl-C does, so that what was begun is ended; a running loop takes it itself."""

    def interrupt(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# What it prints


def _started(
    chosen: ServeSettings,
    orla: Orla,
    silent: Mapping[str, BackendUnavailable | None],
    keys: int,
    url: str,
    *,
    is_demo: bool,
) -> Iterator[str]:
    yield f"orla-lg serve listens at {url}" + (f", configured by {chosen.source}" if chosen.source else "")
    schedulers = orla.core.serving.schedulers
    for name, scheduler in schedulers.items():
        yield f"  {_engine(scheduler, silent[name])}"
    if not schedulers:
        yield "  no engine is behind it: `orla-lg serve --demo` starts one, `--config orla.toml` names yours"
    yield f"policy: {_policies(schedulers)}"
    yield "keys: the demo takes none, and no call needs one" if is_demo else _keys(keys)
    yield ""
    model = next(iter(schedulers), None)
    if is_demo and model is not None:
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 20}
        target = f"--unix-socket {chosen.listen.path} http://localhost" if chosen.listen.path else url
        yield "try it:"
        yield f"  curl {target}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    yield f"graphs reach it by Orla.remote({url!r}), OpenAI's clients by base_url={url + '/v1'!r}"
    again = "; SIGHUP or `orla-lg reload` loads the configuration again" if chosen.source else ""
    yield f"Ctrl-C or SIGTERM drains and ends it{again}"


def _engine(scheduler: BackendScheduler, fault: BackendUnavailable | None) -> str:
    backend, probe = scheduler.backend, scheduler.health.probe
    said = f"{backend.name}  {backend.url}  {backend.engine}"
    if probe is None:
        return f"{said}  NOT REACHABLE: {fault}"
    models = backend.model or ", ".join(probe.distinct[:3]) or "models it does not list"
    wires = ", ".join(["chat", *sorted(probe.wires - PLAIN_WIRES)])
    bound = scheduler.queue.max_concurrency
    parts = [models, f"speaks {wires}", counted(probe.slots, "slot") if probe.slots else ""]
    parts.append(f"at most {counted(bound, 'call')} at once" if bound is not None else "no bound on calls at once")
    return "  ".join([said, *filter(None, parts)])


def _policies(schedulers: Mapping[str, BackendScheduler]) -> str:
    by_policy: dict[str, list[str]] = {}
    for name, scheduler in schedulers.items():
        policies = scheduler.queue.policies
        requests = {stage: name_of(each) for stage, each in policies.requests.items()}
        stage, any_stage = name_of(policies.stage), requests.pop("*")
        both = stage if stage == any_stage else f"{stage}, in a stage {any_stage}"
        both += "".join(f", in {named} {each}" for named, each in requests.items())
        by_policy.setdefault(both, []).append(name)
    if len(by_policy) <= 1:
        return next(iter(by_policy), DEFAULT_STAGE)
    return "; ".join(f"{policy} on {', '.join(names)}" for policy, names in by_policy.items())


def _keys(keys: int) -> str:
    if keys:
        return f"keys: {keys}; each call needs one"
    return "keys: none, so no call needs one; `orla-lg keys create` makes the first"


# reload


def run_reload(args: argparse.Namespace) -> int:
    """Have a server load its configuration again, print what changed, and return the exit status."""
    url, transport = _server(args)
    key = args.key or (config.server_key() if _has_our_key(args.server) else None)
    headers = {"authorization": f"Bearer {key}"} if key else {}
    try:
        with httpx.Client(transport=transport, timeout=RELOAD_PATIENCE_S, trust_env=False) as client:
            answer = client.post(f"{url}/v1/orla/reload", json={"dry_run": args.dry_run}, headers=headers)
        said: Any = answer.json()
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise OrlaError(f"no server answers at {url} ({error}); --server says where it is") from error
    except ValueError as error:
        raise OrlaError(f"{url} answers {answer.status_code}, and is no server of ours") from error
    if not answer.is_success:
        fault = said.get("error") if isinstance(said, dict) else None
        text = str(fault.get("message") if isinstance(fault, dict) else fault or said)[:20_000]
        raise OrlaError(text + (WITHHELD if answer.status_code == 401 and not key and config.server_key() else ""))
    print("would change:" if args.dry_run else "changed:")
    print(said["changes"])
    return 0


def _has_our_key(url: str | None) -> bool:
    """Whether the key in the environment is for a server: the one named there, or one on this machine."""
    from orla_lg.link.dialing import addresses, are_of

    if not url:  # the environment names it, or our own configuration
        return True
    wanted, found = addresses(url), config.server()
    if found is not None and are_of(wanted, found.url):
        return True
    return all(each.is_local for each in wanted)


def _server(args: argparse.Namespace) -> tuple[str, httpx.HTTPTransport | None]:
    """Return where the server is, and how it is reached where that is a Unix socket."""
    url: str | None = args.server
    if not url and (found := config.server()) is not None:
        url = found.url
    if not url:
        chosen = settings(args.config)
        url = chosen.listen.url(tls=chosen.has_tls)
    if url.startswith(UNIX):
        return "http://localhost", httpx.HTTPTransport(uds=url.removeprefix(UNIX))
    return url.rstrip("/"), None
