"""What ``orla-lg serve`` prints once it listens: what it found, where it goes, and how it is reached."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from orla_lg.core.boundary.plain import counted
from orla_lg.core.policies import DEFAULT_STAGE, name_of
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable
from orla_lg.openai_api.adapter import PLAIN_WIRES
from orla_lg.serve.http import traces
from orla_lg.serve.parts import ServerParts
from orla_lg.serve.settings import ServeSettings


def announcement(chosen: ServeSettings, parts: ServerParts, url: str, *, is_demo: bool) -> Iterator[str]:
    """Yield the lines that are printed once a server listens at *url*."""
    yield f"orla-lg serve listens at {url}" + (f", configured by {chosen.source}" if chosen.source else "")
    schedulers = parts.orla.core.serving.schedulers
    for name, scheduler in schedulers.items():
        yield f"  {_engine(scheduler, parts.silent[name])}"
    if chosen.core.elsewhere:
        others = {pool: names for pool, names in chosen.core.pools.items() if pool != chosen.core.pool}
        said = "; ".join(f"{pool}: {', '.join(names)}" for pool, names in others.items())
        yield f"  it is the core of pool {chosen.core.pool}; other cores have {said}"
    elif chosen.table.pool:
        yield f"  it is the core of pool {chosen.table.pool}, which has all backends of this configuration"
    if parts.posted:
        yield f"  {'and ' if schedulers else ''}{counted(parts.posted, 'backend')} posted by API"
    elif not schedulers:
        yield "  no engine is behind it: `orla-lg serve --demo` starts one, `--config orla.toml` names yours"
    if chosen.table.standby:
        yield "standby: it takes over when the core that has the lease in its store ends"
    if place := getattr(parts.store, "place", ""):
        yield f"store: {place}"
    yield f"policy: {_policies(schedulers)}"
    yield "keys: the demo takes none, and no call needs one" if is_demo else _keys(parts.keys)
    if (traces_go_to := traces.destination()) is not None:
        yield f"traces: to {traces_go_to}"
    yield ""
    model = next(iter(schedulers), None)
    if is_demo and model is not None:
        body = {"model": model, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 20}
        target = f"--unix-socket {chosen.listen.path} http://localhost" if chosen.listen.path else url
        yield "try it:"
        yield f"  curl {target}/v1/chat/completions -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
    if chosen.listen.path is None:
        yield f"see it live at {url}/" + (", signed in with a key of scope view" if parts.keys else "")
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
