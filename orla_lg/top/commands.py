"""``orla-lg top``, ``pause``, ``drain``, ``resume``, ``move``, ``set``: look into a process, and steer it."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, Self

from orla_lg import config
from orla_lg.control import protocol
from orla_lg.control.client import OPENING, Client
from orla_lg.control.protocol import ControlReply, Request
from orla_lg.control.state import BackendState, ProcessState
from orla_lg.core.boundary.plain import counted, shown
from orla_lg.errors import ConfigError

TOP_EXAMPLES = f"""\
{OPENING}
examples:
  orla-lg top                           the process of the nearest orla.toml, or of ORLA_CONTROL
  orla-lg top --control orla.sock       another one
  orla-lg top --server https://HOST:8081 --key KEY
                                        a server (orla-lg serve), on any machine; ORLA_SERVER names one too
  orla-lg top --once                    print what is there now, and leave
  orla-lg top --once --json | jq '.backends.heavy.waits[0]'

what it shows:
  backends    state (open, paused, circuit, gone), calls in flight of those allowed, calls that wait (at the
              right by stage), calls and answered tokens per second over the last ten seconds; cached: the
              part of the prompts that was cached; kept: how much of what was expected to be cached was
              still there; and how full the KV cache is believed to be
  orders to caches
              what orla_lg ordered and what came of it (freed, pinned, deferred: not used again, and freed
              later), and whether the next call of the same workflow found it so
  calls that wait
              in their order, and what each waits for: a place, a cache slot, its cache to fit, its prefix,
              a paused backend, a circuit
  workflows whose KV cache is held
              on which backend, and whether the workflow generates, runs a tool, waits for a human, or is
              idle

Ctrl-C leaves.
"""

STEER_EXAMPLES = """\
examples:
  orla-lg drain heavy --timeout 60    pause, have others take its workflows, and wait until nothing is in flight;
                                      then restart the engine
  orla-lg pause heavy                 no more calls go there; those in flight go on, others wait
  orla-lg resume heavy                those that waited go, in order
  orla-lg move thread-7 light         its next calls go there, where the same model is served, with its cache
  orla-lg set limit heavy --max-concurrency 8
  orla-lg set policy --policy edf

Nothing that waits is lost by any of these. Where a mapping is load-aware, calls go to their alternatives
meanwhile. A change lasts as long as the process.
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the commands to the command line."""
    _register_top(subparsers)
    _backend_command(subparsers, "pause", "let no more calls go to a backend of a running process", _pause)
    drain = _backend_command(
        subparsers, "drain", "pause a backend, and wait until nothing is in flight there", _drain
    )
    drain.add_argument(
        "--timeout", type=_seconds, metavar="S", help="wait so many seconds at most (default: as long as it takes)"
    )
    _backend_command(subparsers, "resume", "let calls go to a backend again", _resume)
    _register_move(subparsers)
    _register_set(subparsers)


def _register_top(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    what = "watch a running process: its queues, what each call waits for, where each workflow's cache is"
    parser = _parser(subparsers, "top", what, TOP_EXAMPLES)
    parser.add_argument("--once", action="store_true", help="print what is there now, and leave; no rates then")
    parser.add_argument("--json", action="store_true", help="a line of JSON for each look")
    parser.add_argument(
        "--interval",
        type=_interval,
        default=1.0,
        metavar="S",
        help="seconds from look to look (default: %(default)s)",
    )
    parser.set_defaults(run=top)


def _register_set(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    setting = subparsers.add_parser(
        "set", help="change a policy or a limit of a running process", epilog=STEER_EXAMPLES,
        description="Change a policy or a limit of a running process.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = setting.add_subparsers(title="what", metavar="WHAT", required=True)
    policy = _parser(which, "policy", "order calls by other policies, those that wait as well", STEER_EXAMPLES)
    policy.add_argument("--policy", type=_name, metavar="NAME", help="both: stages, and the calls of each")
    policy.add_argument("--stage-policy", type=_name, metavar="NAME", help="which stage's sub-queue goes next")
    policy.add_argument(
        "--request-policy", type=_name, metavar="NAME", help="which call inside a sub-queue goes next"
    )
    policy.add_argument("--backend", type=_name, metavar="NAME", help="on this backend only (default: on all)")
    policy.set_defaults(run=_set_policy)
    limit = _backend_command(which, "limit", "bound a backend's calls in flight, or those that may wait", _set_limit)
    limit.add_argument("--max-concurrency", metavar="N", help="calls in flight; 'none': as the engine bounds them")
    limit.add_argument("--capacity", metavar="N", help="calls that may wait")


def _register_move(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    what = "have a workflow's next calls go to another backend of its model, and its cache with them"
    parser = _parser(subparsers, "move", what, STEER_EXAMPLES)
    parser.add_argument("workflow", type=_name, metavar="WORKFLOW", help="a thread, a run, or a gateway's session")
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("backend", type=_name, nargs="?", metavar="BACKEND", help="its name, as in orla.toml")
    where.add_argument("--back", action="store_true", help="where its mapping says, again")
    parser.add_argument("--tenant", type=_name, metavar="NAME", help="whose thread it is")
    parser.set_defaults(run=_move)


def _backend_command(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    what: str,
    run: Callable[[argparse.Namespace], int],
) -> argparse.ArgumentParser:
    parser = _parser(subparsers, name, what, STEER_EXAMPLES)
    parser.add_argument("backend", type=_name, metavar="BACKEND", help="its name, as in orla.toml")
    parser.set_defaults(run=run)
    return parser


def _parser(
    subparsers: argparse._SubParsersAction[argparse.ArgumentParser], name: str, what: str, epilog: str
) -> argparse.ArgumentParser:
    parser = subparsers.add_parser(
        name, help=what, description=f"{what[0].upper()}{what[1:]}.", epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--control", metavar="PATH",
        help="the process's socket (default: ORLA_CONTROL, else ORLA_SERVER, else what orla.toml names)",
    )  # fmt: skip
    which.add_argument("--server", metavar="URL", help="a server, in the place of a socket (default: ORLA_SERVER)")
    parser.add_argument(
        "--key",
        help="a key of the server, where it has keys: scope view to look, control to steer (default: "
        "ORLA_SERVER_KEY, for the server in ORLA_SERVER and those on this machine)",
    )
    return parser


def _name(text: str) -> str:
    """Return a name as it can be sent: a command line may hold bytes that are no text."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{shown(text, 200)!r} is no name: it is not UTF-8") from None
    return text


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds


def _interval(text: str) -> float:
    return max(protocol.MIN_INTERVAL_S, _seconds(text))


class ProcessClient(Protocol):
    """What a process is looked at and steered by: its socket, or a server's URL."""

    def ask(self, request: Request, *, extra_s: float | None = 0.0) -> ControlReply:
        """Ask, and return the answer."""
        ...

    def state(self) -> ProcessState:
        """Return the state now."""
        ...

    def watch(self, interval_s: float) -> Iterator[ProcessState]:
        """Yield the state every *interval_s* seconds, until the process ends."""
        ...

    def __enter__(self) -> Self: ...
    def __exit__(self, *exc: object) -> None: ...


def _client(args: argparse.Namespace) -> ProcessClient:
    """Return a connection to the process that is meant."""
    if args.server:
        return _of_server(args.server, args.server, args.key)
    path = config.control(args.control)
    if path is not None and args.key:
        raise ConfigError("--key is a server's, and a socket takes none; --server names the server")
    if path is None and (server := config.server()) is not None:
        return _of_server(server.url, None, args.key)
    if path is None:
        try:
            settings = config.find()
        except config.NoConfiguration as error:
            raise ConfigError(f"which process? {error.why}, and no --control names a socket\n\n{OPENING}") from error
        path = settings.control or None
        if path is None:
            raise ConfigError(f"{settings.source} names no control socket\n\n{OPENING}")
    return Client(path)


def _of_server(url: str, named: str | None, key: str | None) -> ProcessClient:
    from orla_lg.top.asking import ServerClient, ServerKey  # an HTTP client, which a socket needs none of

    return ServerClient(url, ServerKey.of(named, key))


# Looking


def top(args: argparse.Namespace) -> int:
    """Show a running process until it ends or Ctrl-C comes."""
    if not args.json and importlib.util.find_spec("rich") is None:
        raise ConfigError("top draws with rich, which is not installed: pip install 'orla-lg[top]', or give --json")
    try:
        with _client(args) as client:
            states = iter([client.state()]) if args.once else client.watch(args.interval)
            _show(states, args)
    except KeyboardInterrupt:  # the way to leave it
        return 0
    if not args.once:
        print("the process has ended", file=sys.stderr)
    return 0


def _show(states: Iterable[ProcessState], args: argparse.Namespace) -> None:
    if args.json:
        for state in states:
            print(json.dumps(dataclasses.asdict(state)), flush=True)
        return
    from orla_lg.top import view

    if args.once:
        view.print_once(states)
    else:
        view.live(states)


# Steering


def _pause(args: argparse.Namespace) -> int:
    with _client(args) as client:
        client.ask(protocol.Pause(backend=args.backend))
        queue = client.state().backends[args.backend]
    print(f"{args.backend} is paused: {_in_flight(queue, 'goes on', 'go on')}, {_waiting(queue)}")
    return 0


def _resume(args: argparse.Namespace) -> int:
    with _client(args) as client:
        client.ask(protocol.Resume(backend=args.backend))
        queue = client.state().backends[args.backend]
    print(f"{args.backend} goes on: {_in_flight(queue)}, {_waiting(queue)}")
    return 0


def _drain(args: argparse.Namespace) -> int:
    """Drain; exit status 1 if calls are still in flight when the time is up."""
    with _client(args) as client:
        answer = client.ask(protocol.Drain(backend=args.backend, timeout_s=args.timeout), extra_s=args.timeout)
        queue = client.state().backends[args.backend]
    if answer.drained:
        print(f"{args.backend} is drained: no call is in flight, {_waiting(queue)}; `orla-lg resume` lets them go")
        return 0
    state = "stays paused" if queue.paused else "was resumed"
    print(
        f"{args.backend} {state}: {_in_flight(queue, 'is still in flight', 'are still in flight')}, {_waiting(queue)}"
    )
    return 1


def _move(args: argparse.Namespace) -> int:
    with _client(args) as client:
        client.ask(protocol.MoveWorkflow(workflow=args.workflow, backend=args.backend, tenant=args.tenant))
    where = "where its mapping says" if args.backend is None else f"to {args.backend}"
    print(f"the next calls of {shown(args.workflow)} go {where}")
    return 0


def _in_flight(queue: BackendState, one: str = "is in flight", several: str = "are in flight") -> str:
    """Return how many calls are in flight, in words: ``2 calls go on``."""
    return f"{counted(queue.in_flight, 'call')} {one if queue.in_flight == 1 else several}"


def _waiting(queue: BackendState) -> str:
    return f"{counted(queue.waiting, 'call')} {'waits' if queue.waiting == 1 else 'wait'}"


def _set_policy(args: argparse.Namespace) -> int:
    stages, requests = args.stage_policy or args.policy, args.request_policy or args.policy
    asked = protocol.Policy(stage_policy=stages, request_policy=requests, backend=args.backend)
    with _client(args) as client:
        client.ask(asked)
        backends = client.state().backends
    for name in backends if args.backend is None else [args.backend]:
        now = backends[name]
        requests = ", ".join(f"{policy} ({stage})" for stage, policy in now.request_policies.items())
        print(f"{name}: stages go by {now.stage_policy}, calls of one stage by {requests}; {_waiting(now)}")
    return 0


def _set_limit(args: argparse.Namespace) -> int:
    given: dict[str, int | None] = {}
    if args.max_concurrency is not None:
        given["max_concurrency"] = (
            None if args.max_concurrency == "none" else _whole(args.max_concurrency, "--max-concurrency", 1)
        )
    if args.capacity is not None:
        given["capacity"] = _whole(args.capacity, "--capacity", 0)
    with _client(args) as client:
        client.ask(protocol.SetLimit.model_validate({"backend": args.backend, **given}))
        now = client.state().backends[args.backend]
    bound = (
        "any number of calls" if now.max_concurrency is None else f"at most {counted(now.max_concurrency, 'call')}"
    )
    print(f"{args.backend}: {bound} in flight ({now.in_flight} now), {now.capacity:,} waiting ({now.waiting} now)")
    return 0


def _whole(text: str, option: str, least: int) -> int:
    if not text.isdigit() or int(text) < least:
        raise ConfigError(f"{option}: {text!r} is not a whole number of {least} or more")
    return int(text)
