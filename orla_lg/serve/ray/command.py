"""``orla-lg serve --on ray``: the actors made or found, said and followed, and ended where that is asked."""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from orla_lg.config_file import CONFIG_NAME, find_file
from orla_lg.config_tables import RayTable, ServeTable
from orla_lg.core.boundary.plain import counted
from orla_lg.demo.engine import demo_engine
from orla_lg.errors import ConfigError
from orla_lg.serve.interrupting import ended_in_order
from orla_lg.serve.ray.cluster import Cluster, cluster_at
from orla_lg.serve.ray.planning import PlannedActor, ServersAsked, planned
from orla_lg.serve.ray.watching import POLL_S, READY, STANDBY, ActorSeen, ActorWatch

NO_SERVE = ServeTable.model_validate({})
BEGIN_S = 60.0
"""An actor that does not listen after so long is said to be late, and followed like the others."""

LOOK_S = 0.1
DECIDE_S = 3.0
"""A pool's first server that listens has so long to take the lease; there may be a core already that has it."""

MORE_S = 5.0
"""Beyond the time to drain, until an actor is killed that should have ended."""


def serve_on_ray(args: argparse.Namespace) -> int:
    """Have cores run on a Ray cluster, and return the exit status."""
    if not args.on and args.stop:
        raise ConfigError(
            "--stop ends what runs on a cluster that goes on without this command: --on ray=HOST:PORT --stop"
        )
    if args.standby or args.gateway or args.advertise:
        raise ConfigError(
            "--on ray runs standbys and gateways as [ray] of the configuration says, and says where each is"
        )
    if args.on and args.demo:
        raise ConfigError("--demo starts an engine for this command alone, and actors outlive it: --on ray --demo")
    with contextlib.ExitStack() as ending:
        ending.enter_context(ended_in_order())
        file = _demo(ending) if args.demo else args.config or find_file()
        asked = ServersAsked(
            None if file is None else str(file), args.listen_address, args.port, args.store, args.pool
        )
        core = asked.core()
        table, drain_s = core.ray or RayTable.model_validate({}), (core.serve or NO_SERVE).drain_s
        if not args.on:
            print("starting a Ray cluster on this machine, which takes some ten seconds", flush=True)
        cluster = ending.enter_context(cluster_at(args.on))
        ending.enter_context(ended_in_order())  # Ray took the signal for itself
        if args.stop:
            return _stop(cluster, table.namespace, drain_s)
        nodes = cluster.nodes()
        actors = planned(asked, nodes)
        print("\n".join(_head(cluster, core.source, table, len(nodes))), flush=True)
        watch = ActorWatch(cluster.ray, {})
        try:
            _begin(cluster, table.namespace, actors, watch)
            print("\n".join(_foot(cluster, actors, watch)), flush=True)
            while True:
                began_s = time.monotonic()
                for name in watch.look():
                    print(f"  {watch.seen[name].text(name)}", flush=True)
                time.sleep(max(0.0, began_s + POLL_S - time.monotonic()))
        except KeyboardInterrupt:
            if not cluster.is_ours:
                print(f"the actors go on; `{_stops(cluster)}` ends them", flush=True)
                return 0
        finally:
            if cluster.is_ours:
                end(cluster.ray, watch.handles, drain_s)
        print("ended, and the Ray cluster with it", flush=True)
        return 0


def _demo(ending: contextlib.ExitStack) -> Path:
    """Return the configuration of an engine that is started for it, with a store of its own beside it."""
    folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="orla-lg-")))
    backend = ending.enter_context(demo_engine()).backends[0]
    file = folder / CONFIG_NAME
    said = {"url": backend.url, "model": backend.model, "engine": backend.engine}
    lines = [f"[backends.{json.dumps(backend.name)}]", *(f"{key} = {json.dumps(each)}" for key, each in said.items())]
    lines += ["[mapping]", f'"*" = {json.dumps(backend.name)}', "[serve]", 'store = "serve.db"']
    file.write_text("\n".join([*lines, ""]), encoding="utf-8")
    return file


def _begin(cluster: Cluster, namespace: str, actors: Iterable[PlannedActor], watch: ActorWatch) -> None:
    """Make the actors or find them, a pool's first core before its standbys."""
    for each in actors:
        watch.follow(each.name, cluster.actor(each, namespace))
        seen = _begun(each, watch)
        if seen.fingerprint not in ("", each.shipped.fingerprint):
            raise ConfigError(
                f"{each.name} runs already, in the namespace {namespace!r}, with another configuration; "
                f"`{_stops(cluster)}` ends all of them, and then this command starts them with this one"
            )
        print(f"  {seen.text(each.name)}", flush=True)


def _begun(actor: PlannedActor, watch: ActorWatch) -> ActorSeen:
    """Wait until an actor listens, and a pool's first one until it decides, unless another one does."""
    until_s = time.monotonic() + BEGIN_S
    while (now_s := time.monotonic()) < until_s:
        list(watch.look(LOOK_S))
        seen = watch.seen[actor.name]
        is_up = seen.state == READY or (seen.state == STANDBY and actor.number)
        if seen.fault or is_up:
            break
        if seen.state == STANDBY:
            until_s = min(until_s, now_s + DECIDE_S)
        time.sleep(LOOK_S)
    return watch.seen[actor.name]


def _head(cluster: Cluster, source: str, table: RayTable, nodes: int) -> Iterable[str]:
    where = "a Ray cluster that was started for it" if cluster.is_ours else "Ray"
    by = f", configured by {source}" if source else ""
    at = f"{cluster.address}: {counted(nodes, 'node')}, namespace {table.namespace!r}"
    yield f"orla-lg serve on {where} at {at}{by}"
    yield (
        "Ray listens on all interfaces of each node; what keeps others out is its token"
        + (f", that of {cluster.token_file}" if cluster.token_file else "")
        + ", which crosses in plain text unless RAY_USE_TLS=1"
    )
    if cluster.dashboard:
        yield f"dashboard: {cluster.dashboard}"


def _foot(cluster: Cluster, actors: Sequence[PlannedActor], watch: ActorWatch) -> Iterable[str]:
    gateways = [each for each in actors if each.shipped.before]
    cores = [each for each in actors if not each.shipped.before]
    for pool in dict.fromkeys(each.pool for each in cores):
        named = f" ({pool})" if pool else ""
        if urls := watch.urls(each.name for each in cores if each.pool == pool):
            yield f"graphs reach it{named} by Orla.remote({urls!r})"
    if urls := watch.urls(each.name for each in gateways):
        yield f"OpenAI's clients reach it by base_url={urls.partition(',')[0] + '/v1'!r}, one of the gateways"
    if cluster.is_ours:
        yield "Ctrl-C or SIGTERM drains and ends it, and the Ray cluster with it"
    else:
        yield f"Ctrl-C ends this command, and the actors go on; `{_stops(cluster)}` drains and ends them"


def _stops(cluster: Cluster) -> str:
    return f"orla-lg serve --on ray={cluster.address} --stop"


def _stop(cluster: Cluster, namespace: str, drain_s: float) -> int:
    handles = cluster.found(namespace)
    end(cluster.ray, handles, drain_s)
    named = ", ".join(sorted(handles)) or "nothing runs"
    print(f"{'ended' if handles else 'Ray'} in the namespace {namespace!r}: {named}", flush=True)
    return 0


def end(ray: Any, handles: Mapping[str, Any], drain_s: float) -> None:
    """Have actors drain and end: standbys first, that none takes over."""
    watch = ActorWatch(ray, handles)
    list(watch.look(2 * POLL_S))
    cores = {name for name, seen in watch.seen.items() if seen.epoch}
    for group in (handles.keys() - cores, cores):
        asked = [handles[name].end.remote(drain_s + MORE_S) for name in group]
        if asked:
            ray.wait(asked, num_returns=len(asked), timeout=drain_s + 2 * MORE_S)
        for name in group:
            ray.kill(handles[name], no_restart=True)
