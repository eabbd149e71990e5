"""Backends as mappers see them: what each is, how busy and how fast it is, whether it can do what a call asks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from orla_lg.core.call import Ask, Call
from orla_lg.core.engine.backend import Backend, Capability, Cost, Probe, model_asked
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import NO_SPEED, Speed
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import did_you_mean

CHARS_PER_TOKEN_AT_MOST = 12
"""No tokenizer in use packs natural text or code more densely; a prompt refused by it is surely too long."""

SHOWN_MODELS = 20
"""Of those that a backend serves, in a message."""


def nothing() -> int:
    """Return 0, the tokens that a call finds where none are known of."""
    return 0


@dataclass(frozen=True, slots=True)
class BackendView:
    """A backend as mappers see it: what it is, and how busy it is now."""

    name: str
    models: tuple[str, ...]
    """Names in code that mean this backend: its own, its model's, its aliases, what it serves."""
    probe: Probe | None
    """``None`` while the engine has not answered yet."""
    cost: Cost
    quality: float | None
    waiting: int
    in_flight: int
    max_concurrency: int | None
    circuit: Circuit = Circuit.CLOSED
    paused: bool = False
    """Calls for it wait until somebody resumes it (``Orla.pause``)."""
    speed: Speed = NO_SPEED
    load: EngineStats | None = None
    """What the engine said of its own load when it was last asked."""
    waiting_for_prefix: int = 0
    """Of those waiting, who could have a place, but had better wait for a prefix that another call is prefilling."""
    model: str | None = None
    """The one that its configuration names."""
    pool: str = ""
    """Of the core that decides about it, where that is another one than the core that looks."""
    resident: Callable[[], int] = field(default=nothing, repr=False)
    """Looks ``resident_tokens`` up, which not every mapper wants to know."""

    @property
    def resident_tokens(self) -> int:
        """What of the asking call's prompt is believed to be in this backend's KV cache, or on its way there."""
        return self.resident()

    @property
    def shut(self) -> bool:
        """Whether a call for it would get nowhere now: it is paused, or its circuit is open."""
        return self.paused or self.circuit is Circuit.OPEN


def served_names(backend: Backend, probe: Probe | None) -> tuple[str, ...]:
    """Return the names in code that mean *backend*."""
    own = (backend.name, *((backend.model,) if backend.model else ()), *backend.aliases)
    return own + (probe.models if probe else ())


def names(backends: Sequence[BackendView]) -> list[str]:
    """Return the backends' names, for messages."""
    return [backend.name for backend in backends]


def find(backends: Sequence[BackendView], name: str) -> BackendView | None:
    """Return the backend called *name*."""
    for backend in backends:
        if backend.name == name:
            return backend
    return None


def view_of(scheduler: BackendScheduler, call: Call | None = None, *, asks: bool = True) -> BackendView:
    """Return a backend as mappers see it now, on behalf of a call; with *asks* its engine is asked for its load."""
    backend, queue, health, watch = scheduler.backend, scheduler.queue, scheduler.health, scheduler.load
    probe = health.probe
    return BackendView(
        name=backend.name,
        models=served_names(backend, probe),
        probe=probe,
        cost=backend.cost,
        quality=backend.quality,
        waiting=queue.waiting,
        in_flight=queue.in_flight,
        max_concurrency=queue.max_concurrency,
        circuit=Circuit.CLOSED if health.breaker.opened_s is None else health.state(),
        paused=queue.paused,
        speed=scheduler.speed_meter.speed,
        load=None if watch is None else watch.wanted(probe) if asks else watch.latest,
        waiting_for_prefix=scheduler.cache.waiting_for_prefix,
        model=backend.model,
        resident=nothing if call is None else partial(resident_tokens, scheduler, call),
    )


def resident_tokens(scheduler: BackendScheduler, call: Call) -> int:
    """Return how much of a call's prompt it would find in a backend's cache, what others prefill there included."""
    ask = scheduler.isolation.within(call)
    with scheduler.lock:
        return round(scheduler.cache.expected(call, ask))


# Whether an engine can do what a call asks, as far as it said so


def unfit(ask: Ask, backend: BackendView, model: str | None) -> list[str]:
    """Return why *backend* cannot do what is asked; empty where it can, or has not said what it can."""
    probe = backend.probe
    if probe is None:
        return []
    if model is not None:
        return unserved(model, probe) + lacks(ask, probe)
    if not backend.model and model_asked(None, probe, ask.model) is None:
        return [several(probe, ask.model), *lacks(ask, probe)]
    return lacks(ask, probe)


def unserved(model: str, probe: Probe | None) -> list[str]:
    """Return a fault if an engine lists models and *model* is none of them."""
    if probe is None or not probe.models or model in probe.models:
        return []
    return [f"model {model!r} is not served there{did_you_mean(model, probe.models)}"]


def several(probe: Probe, in_code: str) -> str:
    """Return what is wrong where neither the backend nor the code names one of several models."""
    listed = ", ".join(probe.distinct[:SHOWN_MODELS]) + (", …" if len(probe.distinct) > SHOWN_MODELS else "")
    return (
        f"it serves several models ({listed}) and not {in_code!r}, which the code names; name one of them there, "
        "or as the backend's model"
    )


def lacks(ask: Ask, probe: Probe | None) -> list[str]:
    """Return what is asked and an engine cannot do, whatever its model; empty where it has not said what it can."""
    if probe is None:
        return []
    faults = []
    if ask.json_schema and not probe.can(Capability.JSON_SCHEMA):
        faults.append("the engine cannot follow a JSON schema")
    if ask.tools and not probe.can(Capability.TOOLS):
        faults.append("the engine cannot call tools")
    if probe.vision is False and ask.images:
        faults.append("the model cannot see images")
    if probe.context_tokens is not None:
        at_least = ask.prompt_chars // CHARS_PER_TOKEN_AT_MOST
        prompt = f"the prompt has at least {at_least} tokens ({ask.prompt_chars} characters)"
        if at_least > probe.context_tokens:
            faults.append(f"{prompt}, its context holds {probe.context_tokens}")
        elif probe.request_tokens is not None and at_least + (ask.max_tokens or 0) > probe.request_tokens:
            bound = f"max_tokens is {ask.max_tokens}, its context holds {probe.request_tokens} for both"
            faults.append(f"{prompt} and {bound}")
    return faults
