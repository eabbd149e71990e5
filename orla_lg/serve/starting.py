"""The start of ``orla-lg serve``: its store, its socket and its core opened in order, and what is printed of them."""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace

from orla_lg.core.boundary.plain import counted
from orla_lg.core.policies import DEFAULT_STAGE, name_of
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.demo.engine import demo_engine
from orla_lg.errors import BackendUnavailable, ConfigError
from orla_lg.openai_api.adapter import PLAIN_WIRES
from orla_lg.orla import Orla
from orla_lg.serve.interrupting import ended_in_order
from orla_lg.serve.settings import ServeSettings, settings

EXTRA = (
    "aiohttp", "httptools", "orjson", "prometheus_client", "starlette", "uvicorn",
    *(() if sys.platform == "win32" else ("uvloop",))
)  # fmt: skip
INSTALL = "pip install 'orla-lg[serve]'"


def serve(args: argparse.Namespace) -> int:
    """Serve until a signal ends it, and return the exit status."""
    missing = [name for name in EXTRA if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"orla-lg serve needs {', '.join(missing)}, which a plain install leaves out: {INSTALL}")
    if args.demo and args.pool:
        raise ConfigError("--demo has one engine, and one core for it; --pool is for a configuration with [pools]")
    if args.demo and args.config:
        raise ConfigError("--demo serves an engine of its own, --config those of a file; give one of them")
    if args.demo and args.standby:
        raise ConfigError("--demo has no store that another process shares, so it is no --standby of one")
    if args.gateway and (args.demo or args.standby or args.store):
        raise ConfigError("--gateway holds no state and takes no lease: --demo, --standby and --store are a core's")
    if args.core and not args.gateway:
        raise ConfigError("--core says where a gateway's core is; give --gateway too")
    if args.on is not None:
        from orla_lg.serve.ray.command import serve_on_ray

        return serve_on_ray(args)
    if args.stop:
        raise ConfigError(
            "--stop ends what runs on Ray: --on ray=HOST:PORT --stop; a server of its own ends by Ctrl-C"
        )
    chosen = settings(
        args.config,
        args.listen_address,
        args.port,
        args.store,
        args.pool,
        standby=args.standby,
        advertise=args.advertise or (),
        reads_file=not args.demo,
    )
    with contextlib.ExitStack() as ending:
        ending.enter_context(ended_in_order())
        if args.gateway:
            from orla_lg.serve.stateless.starting import serve_gateway

            return serve_gateway(chosen, args.core, ending)
        if args.demo:
            chosen = replace(chosen, core=ending.enter_context(demo_engine()))
        status = _serve(chosen, ending, is_demo=args.demo)
    return _again(status)


def _again(status: int) -> int:
    """Begin again as a standby where that is meant, in the same process and with nothing of what was in it."""
    from orla_lg.serve.ending import EXIT_REPLACED

    if status == EXIT_REPLACED and sys.platform != "win32":
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    return status


def _serve(chosen: ServeSettings, ending: contextlib.ExitStack, *, is_demo: bool) -> int:
    # What the extra brings is imported here: the command line starts without it.
    from orla_lg.serve.begun import LOG_FORMAT, begin
    from orla_lg.serve.server import run

    begun = begin(chosen, ending, in_memory=is_demo)
    logging.basicConfig(level=logging.WARNING, format=LOG_FORMAT)

    def started(url: str) -> None:
        place = getattr(begun.store, "place", "")
        said = _started(chosen, begun.orla, begun.silent, begun.keys, begun.posted, url, place, is_demo=is_demo)
        print("\n".join(said), flush=True)

    gc.collect()
    gc.freeze()  # what the imports made stays: the collector need not look through it at every few hundred calls
    return run(chosen, begun.orla, begun.store, begun.opened, started)


# What it prints


def _started(
    chosen: ServeSettings,
    orla: Orla,
    silent: Mapping[str, BackendUnavailable | None],
    keys: int,
    posted: int,
    url: str,
    store: str = "",
    *,
    is_demo: bool,
) -> Iterator[str]:
    yield f"orla-lg serve listens at {url}" + (f", configured by {chosen.source}" if chosen.source else "")
    schedulers = orla.core.serving.schedulers
    for name, scheduler in schedulers.items():
        yield f"  {_engine(scheduler, silent[name])}"
    if chosen.core.elsewhere:
        others = {pool: names for pool, names in chosen.core.pools.items() if pool != chosen.core.pool}
        said = "; ".join(f"{pool}: {', '.join(names)}" for pool, names in others.items())
        yield f"  it is the core of pool {chosen.core.pool}; other cores have {said}"
    elif chosen.table.pool:
        yield f"  it is the core of pool {chosen.table.pool}, which has all backends of this configuration"
    if posted:
        yield f"  {'and ' if schedulers else ''}{counted(posted, 'backend')} posted by API"
    elif not schedulers:
        yield "  no engine is behind it: `orla-lg serve --demo` starts one, `--config orla.toml` names yours"
    if chosen.table.standby:
        yield "standby: it takes over when the core that has the lease in its store ends"
    if store:
        yield f"store: {store}"
    yield f"policy: {_policies(schedulers)}"
    yield "keys: the demo takes none, and no call needs one" if is_demo else _keys(keys)
    yield ""
    model = next(iter(schedulers), None)
    if is_demo and model is not None:
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 20}
        target = f"--unix-socket {chosen.listen.path} http://localhost" if chosen.listen.path else url
        yield "try it:"
        yield f"  curl {target}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    if chosen.listen.path is None:
        yield f"see it live at {url}/" + (", signed in with a key of scope view" if keys else "")
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
    asked = backend.max_concurrency
    cut = f" (the configuration says {asked:,})" if bound is not None and asked is not None and bound < asked else ""
    parts.append(
        f"at most {counted(bound, 'call')} at once{cut}" if bound is not None else "no bound on calls at once"
    )
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
