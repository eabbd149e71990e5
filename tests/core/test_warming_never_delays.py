"""No warm-up delays or starves a call: beside a desk with warm-ups stands one without, and all calls go as there."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.cache.parts import Shared
from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.engine.backend import Backend, Capability, Effect, Probe, Support
from orla_lg.core.engine.capabilities import Warmed
from orla_lg.core.identity import Identity
from orla_lg.core.memory.events import CacheAction, Verb
from orla_lg.core.policies import policies
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from tests.core.fakes import HandBackground, HandClock, WarmEngine, a_call

WORKFLOWS = st.sampled_from("tuvw")
CAN = {Capability.WARM: Support.NATIVE}
SYSTEM = {"role": "system", "content": "Be kind. " * 200}


class Side:
    """A desk with a clock and a background of its own."""

    def __init__(self, probe: Probe, warm_up: WarmUp | None, bound: int | None) -> None:
        self.clock = HandClock()
        self.background = HandBackground(self.clock)
        backend = Backend("b", "http://b/v1", engine="fake", max_concurrency=bound)
        self.engine = WarmEngine(probe)
        order = policies("b", "fcfs", "fcfs")
        shared = Shared(warm_up=warm_up)
        self.scheduler = BackendScheduler(backend, self.engine, self.background, self.clock, order, shared)  # type: ignore[arg-type]
        self.scheduler.health._learn(probe)
        self.scheduler.health._probed_s = 1e9
        self.calls: dict[str, Queued] = {}

    def enter(self, call: Call) -> None:
        self.calls[call.id] = self.scheduler.enter(call, order=None, running=True, holds_grant=False)

    def leave(self, call_id: str, usage: Usage | None) -> None:
        queued = self.calls.pop(call_id)
        if queued.granted:
            body = {"model": "m", "messages": queued.call.ask.messages}
            self.scheduler.prefetcher.sending(queued, body)
        self.scheduler.leave(
            queued, usage=usage, tokens=0 if usage is None else usage.prompt_tokens, followed=lambda: True
        )

    def pass_time(self, seconds: float) -> None:
        self.background.advance(seconds)
        self.background.advance(0.0)

    def granted(self) -> set[str]:
        return {call_id for call_id, queued in self.calls.items() if queued.granted}


class Beside(RuleBasedStateMachine):
    @initialize(
        slots=st.sampled_from([None, 1, 2]), kv=st.sampled_from([None, 3000]), bound=st.sampled_from([None, 3])
    )
    def start(self, slots: int | None, kv: int | None, bound: int | None) -> None:
        probe = Probe(models=("m",), capabilities=CAN, slots=slots, kv_tokens=kv)
        self.warmed = Side(probe, WarmUp(least_tokens=0, trust_s=1e9), bound)
        self.plain = Side(probe, None, bound)
        self.sides = (self.warmed, self.plain)
        self.turns = dict.fromkeys("tuvw", 1)

    @rule(workflow=WORKFLOWS)
    def call(self, workflow: str) -> None:
        said = [SYSTEM, *({"role": "user", "content": f"{workflow} {n} " * 50} for n in range(self.turns[workflow]))]
        self.turns[workflow] = self.turns[workflow] % 4 + 1
        made = a_call(workflow)
        for side in self.sides:
            call = Call(made.id, Identity(workflow, workflow, "node"), Ask("auto", said), made.said, made.hints,
                        side.clock())  # fmt: skip
            call.answer_tokens = 10.0
            side.enter(call)

    @precondition(lambda self: self.plain.calls)
    @rule(data=st.data(), failed=st.booleans())
    def end(self, data: st.DataObject, failed: bool) -> None:
        call_id = data.draw(st.sampled_from(sorted(self.plain.calls)))
        prompt = round(self.plain.calls[call_id].call.ask.prompt_chars / 4)
        usage = None if failed else Usage(prompt_tokens=prompt, completion_tokens=5)
        for side in self.sides:
            side.leave(call_id, usage)

    @rule(workflow=WORKFLOWS, chance=st.sampled_from([0.6, 1.0]))
    def wish(self, workflow: str, chance: float) -> None:
        for side in self.sides:
            side.scheduler.apply(CacheAction(Verb.WARM, workflow, chance=chance))

    @rule(workflow=WORKFLOWS, verb=st.sampled_from([Verb.RELEASE, Verb.FLUSH]))
    def order(self, workflow: str, verb: Verb) -> None:
        for side in self.sides:
            side.scheduler.apply(CacheAction(verb, workflow))

    @rule(seconds=st.sampled_from([0.0, 0.5, 2.0, 6.0]))
    def wait(self, seconds: float) -> None:
        for side in self.sides:
            side.pass_time(seconds)

    @rule(effect=st.sampled_from([Effect.WARMED, Effect.FAILED]))
    def work(self, effect: Effect) -> None:
        self.warmed.engine.warms = Warmed(effect, Usage(prompt_tokens=500, cached_tokens=0))
        for side in self.sides:
            side.background.do_all()

    @rule()
    def lose(self) -> None:
        for side in self.sides:
            side.scheduler.forgotten()

    @invariant()
    def every_call_goes_as_it_would_without(self) -> None:
        assert self.plain.granted() <= self.warmed.granted()
        for side in self.sides:
            side.scheduler.check_integrity()

    def teardown(self) -> None:
        for side in self.sides if hasattr(self, "sides") else ():
            for call_id in list(side.calls):
                side.leave(call_id, None)
            side.scheduler.check_integrity()
            assert side.scheduler.queue.in_flight == 0


Beside.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestBeside = Beside.TestCase
