"""A workload through the real core before simulated engines, in virtual time."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from itertools import count

from orla_lg.core.call import Hints
from orla_lg.core.engine.backend import Backend, Cost
from orla_lg.core.identity import Identity, workflow_name
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive
from orla_lg.core.workflow import Outcome
from orla_lg.errors import OrlaError
from orla_lg.replay.adapters import SimulatedAdapter, adapter_of
from orla_lg.replay.prompts import PieceAsk, block_hashes, chain_to
from orla_lg.replay.traffic import BackendSetting, Piece
from orla_lg.replay.workload import PlannedCall, Workload
from orla_lg.virtual import VirtualServing
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest

NO_ROOM = "takes more tokens than the engine has room for"
MOST_WAITING = 10_000_000


@dataclass(frozen=True, slots=True)
class SimulatedBackend:
    """A backend: how it is set up, and its engine in numbers."""

    setting: BackendSetting
    parameters: EngineParameters
    engines: int = 1
    """So many like it; a workflow stays with the one where it began."""


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What a workload is played through."""

    name: str
    backends: Mapping[str, SimulatedBackend]
    policy: str | None = None
    """For both levels of all queues; ``None``: each backend's own."""
    admission: bool = True
    memory: str = "default"
    mapping: Mapping[str, str] = field(default_factory=dict)
    """By stage (or ``*``), another backend than the recorded one."""

    def backend_of(self, call: PlannedCall) -> str:
        """Return where a call runs."""
        stage, recorded = call.seen.stage, call.seen.backend or ""
        for name in (stage, stage.rpartition("|")[2], "*"):
            if name in self.mapping:
                return self.mapping[name]
        return recorded


@dataclass(frozen=True, slots=True)
class Played:
    """What a call saw; times in seconds after the begin."""

    call: PlannedCall
    arrived_s: float
    ended_s: float
    first_s: float | None = None
    """``None``: it was not simulated, or ended without an answer."""
    prompt_tokens: int = 0
    cached_tokens: int | None = None
    cost_usd: float | None = None
    error: str = ""
    queue_wait_s: float = 0.0

    @property
    def dispatched_s(self) -> float:
        """When it went to its engine."""
        return self.arrived_s + self.queue_wait_s


class Simulation:
    """Plays a workload once.

    Args:
        workload: The calls.
        arrangement: What they go through.
        progress: Called with how many calls have ended.
    """

    def __init__(
        self, workload: Workload, arrangement: Arrangement, progress: Callable[[int], None] = lambda _: None
    ) -> None:
        self._workload, self._arrangement, self._progress = workload, arrangement, progress
        self._requests: dict[str, SimRequest] = {}
        self._numbers = count()
        self._played: list[Played] = []
        self._left = {call: len(call.after) for call in workload.calls}
        self._open_runs = {run: len(calls) for run, calls in workload.by_run.items()}
        self._at: dict[tuple[str, str], str] = {}
        """By backend and workflow, the engine of those like it."""
        self._open: Counter[str] = Counter()
        engines, self._adapters = dict[Backend, SimEngine](), dict[str, SimulatedAdapter]()
        stages, requests = dict[str, str](), dict[str, str]()
        for name, backend in arrangement.backends.items():
            for number in range(backend.engines):
                made, engine = _backend(name, number, backend), SimEngine(backend.parameters)
                engines[made] = engine
                self._adapters[made.name] = adapter_of(backend.setting, engine)
                stages[made.name] = arrangement.policy or backend.setting.stage_policy
                requests |= backend.setting.request_policy
        ordered_by: Mapping[str, str] = {"*": arrangement.policy} if arrangement.policy else {"*": "fcfs", **requests}
        self._virtual = VirtualServing[SimRequest](
            engines, self._sent, adapters=self._adapters, stage_policy=stages,
            request_policy=ordered_by, memory=arrangement.memory, admission=arrangement.admission, keep_records=1,
        )  # fmt: skip
        for adapter in self._adapters.values():
            adapter.clock = self._virtual.clock

    def run(self) -> list[Played]:
        """Return what every call saw, in the order of the file."""
        with self._virtual as virtual:
            virtual.run(self._all())
        return sorted(self._played, key=lambda each: each.call.number)

    async def _all(self) -> None:
        self._done = asyncio.get_running_loop().create_future()
        async with asyncio.TaskGroup() as group:
            self._group = group
            for call in self._workload.calls:
                if not call.after:
                    self._later(call)
            if self._workload.calls:
                await self._done

    def _later(self, call: PlannedCall) -> None:
        self._virtual.clock.call_later(call.wait_s, lambda: self._begin(call))

    def _begin(self, call: PlannedCall) -> None:
        self._group.create_task(self._play(call))

    async def _play(self, call: PlannedCall) -> None:
        clock, seen = self._virtual.clock, call.seen
        arrived_s = clock()
        if seen.run is not None and self._virtual.serving.book.run(seen.run) is None:
            thread = workflow_name(seen.workflow)
            self._virtual.serving.progress.run_started(
                seen.run, thread=None if thread == seen.run else thread, tenant=seen.tenant, graph=seen.graph
            )
        if not seen.is_counted:
            await asyncio.sleep(seen.duration_s)
            self._ended(Played(call, arrived_s, clock()))
            return
        backend = self._arrangement.backend_of(call)
        request = self._request(call, self._arrangement.backends[backend].parameters)
        if isinstance(request, str):
            self._ended(Played(call, arrived_s, clock(), error=request))
            return
        where = self._place(backend, seen.workflow)
        self._open[where] += 1
        try:
            self._ended(await self._serve(call, request, where))
        except OrlaError as error:
            self._ended(Played(call, arrived_s, clock(), error=f"{type(error).__name__}: {error}"))
        finally:
            self._open[where] -= 1

    async def _serve(self, call: PlannedCall, request: SimRequest, where: str) -> Played:
        seen, serving = call.seen, self._virtual.serving
        arrived_s, place = self._virtual.clock(), f"{seen.stage}:{call.number}"
        state = None if seen.run is None else serving.book.run(seen.run)
        ask = PieceAsk(where, (), stream=True, max_tokens=seen.max_tokens, chain=self._chain(call))
        hints = Hints(
            priority=seen.priority or None, deadline_s=seen.deadline_s or None, tenant=seen.tenant,
            cache=seen.cache_hint,  # type: ignore[arg-type]  # checked when it was read
        )  # fmt: skip
        if state is not None:
            serving.progress.node_entered(state, seen.stage, place, seen.step)
        try:
            identity = Identity(seen.workflow, seen.run, seen.stage, seen.step, place)
            inflight = arrive(serving.services, identity, ask, call_id=request.id, said=hints)
            self._requests[request.id] = request
            record = await self._virtual.serve(inflight)
        finally:
            self._requests.pop(request.id, None)
            if state is not None:
                serving.progress.node_left(state, seen.stage, place)
        first_s = arrived_s + record.queue_wait_s + (record.ttft_s or 0.0)
        cached = record.cached_tokens if self._workload.knows_prompts else seen.cached_tokens
        tokens = seen.prompt_tokens or 0
        priced = self._arrangement.backends[self._arrangement.backend_of(call)].setting.prices is not None
        cost = record.cost_usd if priced else None
        waited_s = record.queue_wait_s
        return Played(
            call, arrived_s, self._virtual.clock(), first_s, tokens, cached, cost, queue_wait_s=waited_s
        )  # fmt: skip

    def _request(self, call: PlannedCall, parameters: EngineParameters) -> SimRequest | str:
        """Return what the engine is to do; or why it cannot."""
        seen, id_ = call.seen, f"{call.number}.{next(self._numbers)}"
        prompt, answer = seen.prompt_tokens or 1, seen.completion_tokens or 1
        if prompt + answer > parameters.longest_tokens:
            return NO_ROOM
        if not self._workload.knows_prompts:  # what was found in the cache then is taken as given
            return SimRequest(id_, max(1, prompt - (seen.cached_tokens or 0)), answer)
        hashes = block_hashes(chain_to(seen.prompt), prompt, parameters.block_tokens, call.answer)
        return SimRequest(id_, prompt, answer, hashes, -round(seen.priority), seen.workflow)

    def _sent(self, inflight: InFlightCall) -> SimRequest:
        """Return what goes to the engine, once the core has chosen engine and slot."""
        request = self._requests.pop(inflight.call.id)
        assert inflight.backend is not None
        return self._adapters[inflight.backend].sent(
            request, None if inflight.slot_lease is None else inflight.slot_lease.slot
        )

    def _chain(self, call: PlannedCall) -> tuple[Piece, ...]:
        known = chain_to(call.seen.prompt)
        return known or (Piece.after(None, call.number + 1, 4 * (call.seen.prompt_tokens or 1)),)

    def _place(self, backend: str, workflow: str) -> str:
        """Return the engine of a backend where a workflow's calls run: where it began, else where least is open."""
        engines = self._arrangement.backends[backend].engines
        if engines == 1:
            return backend
        names = [_name(backend, number) for number in range(engines)]
        return self._at.setdefault((backend, workflow), min(names, key=lambda name: self._open[name]))

    def _ended(self, played: Played) -> None:
        self._played.append(played)
        self._progress(len(self._played))
        run = played.call.run
        self._open_runs[run] -= 1
        if not self._open_runs[run] and played.call.seen.run is not None:
            self._virtual.serving.progress.run_ended(run, Outcome.DONE)
        for follower in played.call.followers:
            self._left[follower] -= 1
            if not self._left[follower]:
                self._later(follower)
        if len(self._played) == len(self._workload.calls) and not self._done.done():
            self._done.set_result(None)


def _name(backend: str, number: int) -> str:
    return backend if number == 0 else f"{backend} {number + 1}"


def _backend(name: str, number: int, backend: SimulatedBackend) -> Backend:
    setting = backend.setting
    prices = setting.prices or (0.0, 0.0, None)
    return Backend(
        _name(name, number), f"http://simulated-{number}/v1", max_concurrency=setting.max_concurrency,
        capacity=min(max(setting.capacity, 1), MOST_WAITING), cost=Cost(*prices),
    )  # fmt: skip


def with_scaled(parameters: EngineParameters, *, prefill: float = 1.0, decode: float = 1.0) -> EngineParameters:
    """Return an engine whose prefill and decode take so many times as long."""
    return replace(
        parameters,
        prefill_token_s=parameters.prefill_token_s * prefill,
        prefill_attention_s=parameters.prefill_attention_s * prefill,
        prefill_s=parameters.prefill_s * prefill,
        request_s=parameters.request_s * prefill,
        request_token_s=parameters.request_token_s * prefill,
        step_s=parameters.step_s * decode,
        decode_sequence_s=parameters.decode_sequence_s * decode,
        decode_context_s=parameters.decode_context_s * decode,
        held_token_s=parameters.held_token_s * decode,
    )
