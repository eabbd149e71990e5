"""Warm-ups by hand: what is warmed, when, for whom, and what came of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest

from orla_lg.core.cache.slots.files import SavedPool
from orla_lg.core.call import Ask, Usage
from orla_lg.core.engine.backend import Backend, Capability, Cost, Effect, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats, Warmed
from orla_lg.core.identity import Identity
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive, serve
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.lookahead.structure import Edge, GraphStructure
from orla_lg.core.memory.events import CacheAction, CacheEvent, Doing, EventKind, Verb
from orla_lg.core.memory.policies import Joined, WarmNextStage, WarmReturns
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.record import Record
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.core.serving import Serving
from orla_lg.core.steps import drive
from orla_lg.core.workflow import Outcome
from tests.core.fakes import Engine, HandBackground, HandClock, Sender, WarmEngine

CAN = dict.fromkeys((Capability.WARM, Capability.CACHED_TOKENS), Support.NATIVE)
SHARED = Probe(models=("m",), capabilities=CAN, incarnation="first")
CALL_S = 2.0
SLOTS = Probe(models=("m",), capabilities=CAN, slots=2)


def system(stage: str = "node") -> dict[str, str]:
    return {"role": "system", "content": f"You {stage}. " * 400}


class Bench:
    """A core with one engine, its clock, its background, and runs on threads."""

    def __init__(self, probe: Probe = SHARED, *, says: Warmed | None = None, **settings: Any) -> None:
        self.clock = HandClock()
        self.background = HandBackground(self.clock)
        self.engine = WarmEngine(probe, says)
        warm_up = settings.pop("warm_up", WarmUp())
        self.serving = Serving(
            {Backend("b", "http://b/v1", model="m", **{"engine": "fake", **settings}): self.engine},
            mapper=None, memory=Joined(WarmReturns(), WarmNextStage()), clock=self.clock,
            background=self.background, warm_up=warm_up,
        )  # fmt: skip
        self.scheduler: BackendScheduler = self.serving.schedulers["b"]
        self.scheduler.health._learn(probe)
        self.scheduler.health._probed_s = self.clock()
        self.runs = 0

    def run(self, thread: str, graph: str = "graph", forecast: Forecast | None = None) -> str:
        self.runs += 1
        self.serving.progress.run_started(f"r{self.runs}", thread=thread, graph=graph, forecast=forecast)
        return f"r{self.runs}"

    def call(
        self,
        run: str,
        *said: str,
        stage: str = "node",
        cached: int | None = 0,
        tokens: int = 1000,
        during: Callable[[], None] | None = None,
    ) -> Record:
        state = self.serving.book.run(run)
        assert state is not None
        messages = [system(stage), *({"role": "user", "content": each} for each in said)]
        inflight = arrive(
            self.serving.services, Identity(state.workflow, run, stage), Ask("auto", messages),
            call_id=self.serving.new_id(),
        )  # fmt: skip
        records: list[Record] = []
        usage = Usage(prompt_tokens=tokens, cached_tokens=cached, completion_tokens=5)
        body = {"model": "m", "messages": messages}
        drive(serve(inflight, Speaker(body, usage, during or self.pass_time), records.append))
        return records[0]

    def pass_time(self) -> None:
        self.clock.now += CALL_S

    def wait(self, seconds: float = 0.0) -> None:
        """Let timers fire and begin what they begin; nothing of it is done yet."""
        self.background.advance(seconds)
        self.background.advance(0.0)

    def returns(self, thread: str = "t") -> str:
        """A thread that was interrupted runs on, and what it had in the cache is gone."""
        first = self.run(thread)
        self.call(first, "hello")
        self.serving.progress.run_ended(first, Outcome.INTERRUPTED)
        self.scheduler.forgotten()
        return self.run(thread)

    @property
    def said(self) -> Any:
        return self.serving.statistics().backends["b"].warm_ups


class Speaker(Sender):
    """Says what it sends, and what the engine counted."""

    def __init__(self, body: Mapping[str, Any], usage: Usage, during: Callable[[], None]) -> None:
        super().__init__()
        self.body, self.usage, self.during = body, usage, during

    def send(self, inflight: InFlightCall) -> Any:
        inflight.sends(self.body)
        inflight.saw(self.usage)
        inflight.first_token()
        self.during()
        return super().send(inflight)


@pytest.mark.parametrize("probe", [SHARED, SLOTS], ids=["shared", "slots"])
def test_who_returns_finds_his_history_again(probe: Probe) -> None:
    bench = Bench(probe)
    run = bench.returns()
    bench.wait()
    bench.serving.check_integrity()
    assert bench.scheduler.prefetcher.running is not None and not bench.engine.bodies
    bench.background.do_all()
    (body,) = bench.engine.bodies
    assert body["messages"] == [system(), {"role": "user", "content": "hello"}] and body["workflow"] == "t"
    assert body["slot"] == (0 if probe.slots else None) and body["priority"] < 0
    before = bench.serving.records.records()[-1]
    assert before.cache_orders[-1] == "warm:warmed", "it is in the record of the call before"

    record = bench.call(run, "hello", "again", cached=1000, tokens=1100)
    assert record.expected_cached_tokens is not None and record.expected_cached_tokens > 900
    assert bench.serving.records.find(before.id).cache_borne_out, "and the next call bore it out"
    assert (bench.said.warmed_tokens, bench.said.used_tokens, bench.said.wasted_tokens) == (1000, 1000, 0)
    assert bench.serving.statistics().calls == 2, "a warm-up is no call"
    bench.serving.check_integrity()


@pytest.mark.parametrize("probe", [SHARED, SLOTS], ids=["shared", "slots"])
def test_the_call_gives_up_what_was_to_warm_it(probe: Probe) -> None:
    bench = Bench(probe)
    run = bench.returns()
    bench.wait()
    under_way = bench.scheduler.prefetcher.running
    assert under_way is not None and under_way.task is not None
    record = bench.call(run, "hello", "again")
    assert record.queue_wait_s == 0 and record.expected_cached_tokens == 0, "what was given up is not believed in"
    bench.wait()
    assert under_way.task.cancelled()
    bench.background.do_all()
    bench.serving.check_integrity()
    assert not bench.engine.bodies, "it had not begun"
    assert (bench.said.started, bench.said.given_up, bench.said.warmed_tokens) == (1, 1, 0)
    bench.wait()
    assert bench.scheduler.prefetcher.running is None, "nor does it begin anew"


def test_a_call_of_somebody_else_gives_it_up_where_there_is_no_room_and_it_begins_anew_afterwards() -> None:
    bench = Bench(SLOTS)
    bench.returns()
    bench.wait()
    bench.call(bench.run("other"), "hi")
    assert bench.said.given_up == 1
    bench.wait()
    assert bench.scheduler.prefetcher.running is not None and bench.said.started == 2


def test_where_there_is_room_for_more_it_goes_on_beside_the_calls_of_others() -> None:
    bench = Bench(SHARED, max_concurrency=8)
    bench.returns()
    bench.wait()
    bench.call(bench.run("other"), "hi")
    bench.background.do_all()
    assert (bench.said.given_up, bench.said.done) == (0, 1)


def test_what_is_still_there_is_not_warmed() -> None:
    bench = Bench()
    first = bench.run("t")
    bench.call(first, "hello")
    bench.serving.progress.run_ended(first, Outcome.INTERRUPTED)
    bench.run("t")
    bench.wait()
    bench.background.do_all()  # the engine says that it is still the same
    bench.wait()
    assert bench.said.started == 0 and bench.said.refused == {"there": 1}


def test_an_engine_that_was_restarted_overnight_is_asked_first() -> None:
    bench = Bench()
    first = bench.run("t")
    bench.call(first, "hello")
    bench.serving.progress.run_ended(first, Outcome.INTERRUPTED)
    bench.clock.now += 8 * 3600
    bench.engine.says = Probe(models=("m",), capabilities=CAN, incarnation="second")
    bench.run("t")
    bench.wait()
    assert bench.scheduler.prefetcher.running is None, "as far as we know it is all there"
    bench.background.do_all()  # the probe
    bench.wait()
    assert bench.scheduler.prefetcher.running is not None, "and now we know better"


def test_who_returns_where_nothing_is_warmed_has_the_engine_asked_too_and_a_stranger_not() -> None:
    bench = Bench(warm_up=None)
    first = bench.run("t")
    bench.call(first, "hello")
    bench.serving.progress.run_ended(first, Outcome.DONE)
    bench.clock.now += 8 * 3600
    bench.run("stranger")
    bench.wait()
    assert not bench.background.work
    bench.engine.says = Probe(models=("m",), capabilities=CAN, incarnation="second")
    bench.run("t")
    asked = bench.scheduler.health.connect()
    assert asked is not None and not asked.done(), "calls wait for the answer"
    bench.background.do_all()
    assert asked.done() and bench.scheduler.health.connect() is None
    assert bench.scheduler.cache.tokens_of("t") == 0, "what was believed there went with the engine before"


def test_who_returned_waits_for_nobody_any_more_so_what_is_warmed_is_not_saved() -> None:
    bench = Bench(SLOTS)
    bench.returns()
    bench.wait()
    bench.background.do_all()
    (mine,) = [slot for slot in bench.scheduler.cache.table.slots if slot.owner == "t"]  # type: ignore[union-attr]
    assert mine.tokens == 1000 and mine.doing is Doing.TOOL


def test_what_a_caller_said_in_an_object_goes_with_what_the_adapter_says_in_it() -> None:
    bench = Bench()
    bench.returns()
    last = bench.scheduler.prefetcher.prompts.last
    prompt = last.get("t")
    assert prompt is not None
    last.put("t", replace(prompt, body={**prompt.body, "vllm_xargs": {"theirs": 1}}))
    bench.engine.request_fields = lambda ask, told: {"vllm_xargs": {"ours": told.workflow}}  # type: ignore[method-assign]
    bench.wait()
    bench.background.do_all()
    assert bench.engine.bodies[0]["vllm_xargs"] == {"theirs": 1, "ours": "t"}


@pytest.mark.parametrize(("away_s", "asked"), [(0.5, False), (2.0, True)])
def test_who_returns_has_an_engine_asked_that_was_asked_not_long_ago(away_s: float, asked: bool) -> None:
    bench = Bench()
    first = bench.run("t")
    bench.call(first, "hello", during=lambda: None)
    bench.serving.progress.run_ended(first, Outcome.INTERRUPTED)
    bench.clock.now += away_s
    bench.engine.says = Probe(models=("m",), capabilities=CAN, incarnation="second")
    bench.run("t")
    bench.wait()
    assert bench.scheduler.health.asking is asked
    bench.background.do_all()
    bench.wait()
    assert (bench.scheduler.prefetcher.running is not None) is asked


def test_an_engine_that_cannot_tell_is_not_believed_for_ever() -> None:
    bench = Bench(SLOTS, warm_up=WarmUp(trust_s=60.0))
    first = bench.run("t")
    bench.call(first, "hello")
    bench.serving.progress.run_ended(first, Outcome.INTERRUPTED)
    bench.clock.now += 61
    bench.run("t")
    bench.wait()
    assert bench.said.started == 1


@pytest.mark.parametrize(
    ("why", "bench"),
    [
        ("engine", lambda: Bench(engine="openai")),
        ("engine", lambda: Bench(warm_up=None)),
        ("priced", lambda: Bench(cost=Cost(input_per_mtoken=1.0))),
        ("unwell", lambda: Bench(Probe(models=("m",), capabilities={Capability.WARM: Support.UNSUPPORTED}))),
        ("unknown", lambda: Bench(warm_up=WarmUp(keep_chars=10))),
        ("short", lambda: Bench(warm_up=WarmUp(least_tokens=1001))),
    ],
)
def test_why_nothing_is_warmed(why: str, bench: Any) -> None:
    made = bench()
    made.returns()
    made.wait()
    made.background.do_all()
    made.wait()
    assert (made.said.started, made.said.refused) == (0, {why: 1})
    if why in ("engine", "unknown") and made.scheduler.prefetcher.settings is None:
        assert made.said.kept_prompts == 0, "who wants no warm-ups has no prompts kept"


@pytest.mark.parametrize(
    ("engine", "settings", "why"),
    [
        (WarmEngine(SHARED), {}, None),
        (WarmEngine(SHARED), {"warm_up": None}, "warm_up=False"),
        (WarmEngine(SHARED), {"cost": Cost(input_per_mtoken=1.0)}, "priced=True"),
        (WarmEngine(SHARED), {"engine": "openai"}, 'engine="openai"'),
        (Engine(SHARED), {}, "engine='fake'"),
    ],
)
def test_a_backend_that_is_never_warmed_says_why_and_what_to_do(engine: Any, settings: Any, why: str | None) -> None:
    warm_up = settings.pop("warm_up", WarmUp())
    backend = Backend("b", "http://b/v1", model="m", **{"engine": "fake", **settings})
    serving = Serving({backend: engine}, mapper=None, memory=WarmReturns(), clock=HandClock(), warm_up=warm_up)
    (said,) = serving.progress.why_never_warmed().values()
    assert (said is None) if why is None else (said is not None and why in said)


def test_a_priced_backend_is_warmed_if_its_user_says_so_and_it_is_told_what_that_cost() -> None:
    bench = Bench(cost=Cost(input_per_mtoken=2.0), warm_up=WarmUp(priced=True))
    bench.returns()
    spent = bench.serving.costs.statistics()
    bench.wait()
    bench.background.do_all()
    assert bench.said.cost_usd == pytest.approx(0.002)
    assert bench.serving.costs.statistics() == spent


def test_an_engine_that_others_keep_busy_is_left_alone() -> None:
    bench = Bench()
    bench.returns()
    bench.scheduler.load = Loaded()  # type: ignore[assignment]
    bench.wait()
    assert bench.said.started == 0
    Loaded.stats = EngineStats(kv_usage=0.1, waiting=0)
    bench.scheduler.go_on()
    bench.wait()
    assert bench.said.started == 1


class Loaded:
    stats = EngineStats(kv_usage=0.95)

    def wanted(self, probe: Probe | None) -> EngineStats:
        return self.stats


def crowded(probe: Probe = SLOTS) -> tuple[Bench, Any]:
    """Two slots that two others hold, who wait; the first one's place is lost."""
    bench = Bench(probe)
    for thread in ("t", "u", "v"):
        bench.call(bench.run(thread), f"hello {thread}")
        bench.clock.now += 4.0  # of the five that each may hold
    slots = bench.scheduler.cache.table
    assert slots is not None and [slot.owner for slot in slots.slots] == ["v", "u"]
    return bench, slots


def test_a_slot_that_somebody_holds_is_not_taken_before_his_favour_ends_and_it_is_looked_again_then() -> None:
    bench, slots = crowded()
    bench.call("r2", "hello u")
    bench.call("r3", "hello v")
    bench.scheduler.apply(CacheAction(Verb.WARM, "t"))
    bench.wait()
    assert bench.scheduler.prefetcher.running is None and bench.said.refused == {}
    bench.wait(5.0)
    assert bench.scheduler.prefetcher.running is not None
    bench.background.do_all()
    (mine,) = [slot for slot in slots.slots if slot.owner == "t"]
    assert (mine.index, mine.held, mine.tokens) == (1, False, 1000), "the one that his call would take"
    assert mine.doing is Doing.TOOL, "he comes soon: of slots that may be taken, this is not the first"
    record = bench.call("r1", "hello t", "again", cached=1000, tokens=1100)
    assert record.expected_cached_tokens is not None and record.expected_cached_tokens > 900
    assert (bench.said.used_tokens, bench.said.wasted_tokens) == (1000, 0)
    bench.serving.check_integrity()


def test_a_slot_that_was_just_warmed_for_somebody_else_is_not_taken() -> None:
    bench, slots = crowded()
    bench.clock.now += 5.0
    bench.call(bench.run("w"), "hello w")
    bench.clock.now += 9.0
    for thread in ("t", "u", "v", "w"):
        bench.scheduler.apply(CacheAction(Verb.WARM, thread))
        bench.wait()
        bench.background.do_all()
        bench.wait()
    assert bench.said.done == 2, "with two slots, for two"
    assert all(bench.scheduler.prefetcher.book.owes(str(slot.owner)) for slot in slots.slots)
    bench.serving.check_integrity()


def test_where_slots_are_saved_nobodys_is_taken_for_a_warm_up() -> None:
    bench, slots = crowded()
    bench.clock.now += 9.0
    assert slots.slot_for_prefetch("t", (), bench.clock()) is not None
    slots.swaps.pool, slots.swaps.able = SavedPool("b", 4), True
    assert slots.slot_for_prefetch("t", (), bench.clock()) is None


def test_who_is_warmed_for_may_take_a_slot_and_what_was_prefilled_until_it_was_given_up_is_found() -> None:
    bench, _ = crowded()
    bench.clock.now += 9.0
    bench.scheduler.apply(CacheAction(Verb.WARM, "t"))
    bench.wait()
    under_way = bench.scheduler.prefetcher.running
    assert under_way is not None
    under_way.sent = True  # as when its request has begun
    fresh: list[bool] = []
    record = bench.call(
        "r1", "hello t", "again", cached=600, tokens=1100,
        during=lambda: fresh.extend(lease.fresh for lease in bench.scheduler.cache.leases.values()),
    )  # fmt: skip
    assert record.cache_action == "reused" and record.expected_cached_tokens == 0
    assert fresh == [False], "the engine may use what it has"
    said = bench.said
    assert (said.given_up, said.warmed_tokens, said.used_tokens, said.wasted_tokens) == (1, 600, 600, 0)
    bench.wait()
    bench.background.do_all()
    bench.serving.check_integrity()


def test_who_holds_a_slot_holds_it_no_longer_for_being_warmed() -> None:
    bench = Bench(SLOTS)
    run = bench.run("t")
    bench.call(run, "hello")
    slots = bench.scheduler.cache.table
    assert slots is not None
    since_s = slots.slots[0].last_used_s
    slots.lose_contents()
    bench.clock.now += 2
    bench.scheduler.apply(CacheAction(Verb.WARM, "t"))
    bench.wait()
    bench.background.do_all()
    assert (slots.slots[0].held, slots.slots[0].last_used_s, slots.slots[0].tokens) == (True, since_s, 1000)


def test_an_engine_that_refuses_is_counted_and_not_believed() -> None:
    bench = Bench(SLOTS, says=Warmed(Effect.FAILED))
    run = bench.returns()
    bench.wait()
    bench.background.do_all()
    assert (bench.said.failed, bench.said.done) == (1, 0)
    assert bench.call(run, "hello", "again").expected_cached_tokens == 0
    bench.serving.check_integrity()


@pytest.mark.parametrize("end", ["deleted", "flushed"])
def test_a_workflow_whose_cache_may_go_is_warmed_no_more(end: str) -> None:
    bench = Bench(SLOTS)
    bench.returns()
    bench.wait()
    if end == "deleted":
        bench.serving.progress.thread_deleted("t")
        assert bench.said.kept_prompts == bench.said.kept_chars == 0
    else:
        bench.scheduler.apply(CacheAction(Verb.FLUSH, "t"))
    assert bench.said.given_up == 1
    bench.wait()
    bench.background.do_all()
    assert bench.said.done == 0 and bench.scheduler.prefetcher.running is None
    bench.serving.check_integrity()


# The next stage


def two_stages(bench: Bench) -> Forecast:
    ways = {"__start__": Edge(always=("plan",)), "plan": Edge(always=("write",)), "write": Edge(always=("__end__",))}
    return bench.serving.lookahead.forecast("graph", GraphStructure(ways), {})


def test_while_a_stage_is_busy_the_beginning_of_the_next_is_prefilled() -> None:
    bench = Bench(SHARED, max_concurrency=8)
    forecast = two_stages(bench)
    for number in range(3):
        run = bench.run(f"t{number}", forecast=forecast)
        for stage in ("plan", "write"):
            state = bench.serving.book.run(run)
            assert state is not None
            bench.serving.progress.node_entered(state, stage)
            bench.call(run, f"{stage} {number}", stage=stage)
            bench.serving.progress.node_left(state, stage)
        bench.serving.progress.run_ended(run, Outcome.DONE)
    bench.wait()
    bench.scheduler.forgotten()
    state = bench.serving.book.run(bench.run("new", forecast=forecast))
    assert state is not None
    bench.serving.progress.node_entered(state, "plan")

    def meanwhile() -> None:
        bench.wait()
        bench.background.do_all()

    bench.call(state.id, "plan new", stage="plan", during=meanwhile)
    (body,) = bench.engine.bodies
    assert body["messages"] == [system("write")] and body["stage"] == "write" and body["workflow"] == "new"
    bench.call(state.id, "write new", stage="write", cached=950)
    assert bench.said.used_tokens == 950 and bench.said.wasted_tokens == 50


def test_a_stage_without_calls_is_a_good_time_too() -> None:
    heard: list[CacheEvent] = []

    class Ears:
        def decide(self, event: CacheEvent) -> list[CacheAction]:
            heard.append(event)
            return []

    bench = Bench()
    bench.serving.memory.policy = Ears()
    forecast = two_stages(bench)
    for number in range(12):
        run = bench.serving.book.run(bench.run(f"t{number}", forecast=forecast))
        assert run is not None
        bench.serving.progress.node_entered(run, "plan")
        bench.clock.now += 2.0
        bench.serving.progress.node_left(run, "plan")
        bench.serving.progress.node_entered(run, "write")
        bench.call(run.id, "x", stage="write")
        bench.serving.progress.node_left(run, "write")
        bench.serving.progress.run_ended(run.id, Outcome.DONE)
    busy = [event for event in heard if event.kind is EventKind.STAGE_BUSY and event.stage == "plan"]
    assert busy and busy[-1].ahead == {("write", "b"): pytest.approx(1.0, abs=0.2)}
    assert busy[-1].returns is not None and busy[-1].returns.usual_s == pytest.approx(2.0, abs=0.1)


def test_only_what_is_likely_is_prepared_for() -> None:
    ahead = {("write", "b"): 0.6, ("ask", "b"): 0.4, ("write", "c"): 0.5}
    said = WarmNextStage().decide(CacheEvent(EventKind.STAGE_BUSY, "w", graph="g", stage="plan", ahead=ahead))
    assert [(action.backend, action.stage, action.chance) for action in said] == [("b", "write", 0.6)]
    both = Joined(WarmNextStage(0.3)).decide(CacheEvent(EventKind.STAGE_BUSY, "w", graph="g", ahead=ahead))
    assert len(both) == 3, "several stages are warmed for, on one backend too"


def test_what_is_due_is_no_more_begun() -> None:
    bench = Bench(SLOTS)
    run = bench.returns()
    bench.wait()
    bench.background.do_all()
    bench.scheduler.forgotten()
    bench.scheduler.apply(CacheAction(Verb.WARM, "t", within_s=5.0))
    bench.clock.now += 6.0
    bench.wait()
    assert bench.said.refused == {"late": 1} and bench.said.started == 1
    bench.call(run, "hello")
