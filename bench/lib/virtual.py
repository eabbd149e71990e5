"""Runs in virtual time: the real core before a simulated engine, and what a wrapped graph would have it know."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from bench.lib import core
from bench.lib.core import Ask, Backend, Capability, InFlightCall, Outcome, Probe, RunState, Support
from bench.lib.engines import Message
from orla_lg.testing.virtual import StillAdapter, VirtualServing
from orla_lg_sim.blocks import chain
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest

PLAIN = (Capability.CACHED_TOKENS, Capability.PRIORITY)


def probe_of(parameters: EngineParameters, native: Iterable[Capability], incarnation: str | None = None) -> Probe:
    """Return what a probe of an engine with these capabilities says."""
    can = {each: Support.NATIVE if each in native else Support.UNSUPPORTED for each in Capability}
    return Probe(
        capabilities=can, context_tokens=parameters.context_tokens, kv_tokens=parameters.kv_tokens,
        incarnation=incarnation,
    )  # fmt: skip


def request_of(
    words: Any, name: str, messages: Sequence[Message], answer: Sequence[str], block_tokens: int, priority: int = 0
) -> SimRequest:
    """Return a request with the blocks of its prompt and of the answer that it will get."""
    prompt = words.prompt(messages)
    generated = [token for piece in answer for token in words.encode(piece)[:1]]
    hashes = chain([*prompt, *generated], block_tokens)
    return SimRequest(name, len(prompt), max(1, len(answer)), hashes, priority=priority)


class Runs:
    """Runs of graphs before a core with one engine."""

    def __init__(
        self, backend: Backend, engine: SimEngine, *, adapter: StillAdapter | None = None,
        sent: Callable[[InFlightCall, SimRequest], SimRequest] = lambda inflight, request: request, **options: Any,
    ) -> None:  # fmt: skip
        self._requests: dict[str, SimRequest] = {}
        adapters = {} if adapter is None else {"adapters": {backend.name: adapter}}
        self.virtual = VirtualServing[SimRequest](
            {backend: engine}, lambda inflight: sent(inflight, self._requests.pop(inflight.call.id)), **adapters,
            **options,
        )  # fmt: skip
        self.clock = self.virtual.clock

    @property
    def progress(self) -> core.GraphProgress:
        return self.virtual.serving.progress

    def begin(self, name: str, **how: Any) -> RunState:
        """Begin a run; its thread, graph and forecast as ``GraphProgress`` takes them."""
        return self.progress.run_started(name, **{"thread": None, **how})

    def end(self, state: RunState, outcome: Outcome = Outcome.DONE) -> None:
        self.progress.run_ended(state.id, outcome)

    @contextmanager
    def node(self, state: RunState, stage: str, namespace: str = "", step: int | None = None) -> Iterator[None]:
        """Be in a node of a run."""
        self.progress.node_entered(state, stage, namespace, step)
        yield
        self.progress.node_left(state, stage, namespace)

    async def call(
        self, state: RunState, stage: str, ask: Ask, request: SimRequest, *, step: int | None = None,
        namespace: str = "", said: core.Hints = core.NO_HINTS,
    ) -> core.Record:  # fmt: skip
        """Make a call of a node, which has been entered; the request's id is the call's."""
        identity = core.Identity(state.workflow, state.id, stage, step, namespace)
        inflight = core.arrive(self.virtual.serving.services, identity, ask, call_id=request.id, said=said)
        self._requests[request.id] = request
        return await self.virtual.serve(inflight)
