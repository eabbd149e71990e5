from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from orla_lg.core.cache.gate import GATE_TOKENS, PATIENCE_S, Held
from orla_lg.core.cache.parts import Shared
from orla_lg.core.cache.prefix.admission import GROWTH_SHARE, LENIENCE, LOOK_AT
from orla_lg.core.call import NO_HINTS, Ask, Call, Hints, Usage
from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.core.engine.speed import PREFILL_TOKENS_PER_S, Speed
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.core.memory.events import CacheAction, Doing, Verb
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import BackendScheduler
from orla_lg.errors import BackendUnavailable
from tests.core.fakes import Engine, HandBackground, HandClock, identity
from tests.effort import lines_run

Message = dict[str, str]

PLENTY = 10**9
SHORT, LONG = "be nice", "policy " * 200
"""System prompts: of 2 tokens, and of 350, which is worth waiting for."""

POLICIES = ("fcfs", "workflow_fcfs", "priority", "sjf", "las")


class Growth(Estimates):
    """All workflows are known to grow by so many tokens."""

    def __init__(self, tokens: float | None) -> None:
        super().__init__()
        self.tokens = tokens

    def growth_tokens(self, graph: str, stage: str, visit: int) -> float | None:
        return self.tokens


def a_scheduler(
    kv_tokens: int | None = None, *, policy: str = "fcfs", request: str | None = None, grows: float | None = None,
    **limits: Any,
) -> tuple[BackendScheduler, HandBackground]:  # fmt: skip
    clock = HandClock()
    background = HandBackground(clock)
    chosen = policies("b", policy, request or policy)
    scheduler = BackendScheduler(
        Backend("b", "http://b/v1", **limits), Engine(), background, clock, chosen, Shared(Growth(grows))
    )
    scheduler.health._learn(Probe(kv_tokens=kv_tokens))
    return scheduler, background


def say(*texts: str) -> list[Message]:
    roles = ["system", *("user", "assistant") * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def a_call(
    scheduler: BackendScheduler, workflow: str, messages: Sequence[Message], *, stage: str = "node",
    answer: float = 10.0, standing: RunShare | None = None, **hints: Any,
) -> Call:  # fmt: skip
    said = Hints(**hints) if hints else NO_HINTS
    ask = Ask("auto", list(messages))
    return Call(
        "c", identity(workflow, stage, f"run of {workflow}"), ask, said, said, scheduler.clock(),
        standing=standing or RunShare(), answer_tokens=answer,
    )  # fmt: skip


def enter(
    scheduler: BackendScheduler, workflow: str, tokens: float = 100, *, begins: str = "", **more: Any
) -> Queued:
    """A call with a prompt of so many tokens that begins like others or like none."""
    text = f"{begins or workflow} ".ljust(int(tokens * 4) - 5, "x")
    return queue(scheduler, a_call(scheduler, workflow, [{"role": "user", "content": text}], **more))


def queue(scheduler: BackendScheduler, call: Call, *, holds_grant: bool = False) -> Queued:
    return scheduler.enter(call, order=None, running=True, holds_grant=holds_grant)


def leave(
    scheduler: BackendScheduler,
    queued: Queued,
    *,
    reached: bool = True,
    followed: bool = True,
    usage: Usage | None = None,
) -> None:
    scheduler.leave(queued, usage=usage, tokens=1 if reached else 0, followed=lambda: followed)


class Passed(NamedTuple):
    """A call that waited when another was granted."""

    queued: Queued
    held: Held | None
    resident: bool
    head: bool


class AdmissionMachine(RuleBasedStateMachine):
    """Workflows with growing conversations at one desk; every single grant is judged by what held just before it."""

    @initialize(
        size=st.sampled_from([None, 150, 500, 1500, PLENTY]), bound=st.none() | st.integers(1, 4),
        policy=st.sampled_from(POLICIES),
    )  # fmt: skip
    def start(self, size: int | None, bound: int | None, policy: str) -> None:
        limits = {"max_concurrency": bound} if bound else {}
        self.scheduler, self.background = a_scheduler(size, policy=policy, **limits)
        self.policies = self.scheduler.queue.policies
        self.inside: list[Queued] = []
        self.granted: list[Queued] = []
        self.said = {name: say(LONG if name in "uvw" else SHORT) for name in "uvwxyz"}
        self.standing = {name: RunShare(order=n) for n, name in enumerate("uvwxyz")}
        self.grant, self.scheduler._grant = self.scheduler._grant, self.judged  # type: ignore[method-assign]

    # Every grant

    def judged(self, queued: Queued, now: float, *, extra: bool = False) -> Queued:
        admission, limit = self.scheduler.cache.admission, self.scheduler.cache.admission.capacity.limit
        assert queued not in self.granted, "granted twice"
        self.granted.append(queued)
        new, alone = queued.call.identity.workflow not in admission.references, not admission._entries
        waiting = [each for each in self.scheduler.queue if each is not queued]
        heads = set(self.scheduler.queue.heads())
        before = [
            Passed(each, self.why_held(each), each.call.identity.workflow in admission.references, each in heads)
            for each in waiting
        ]
        mine = self.why_held(queued)
        self.grant(queued, now, extra=extra)
        if extra:
            return queued
        assert mine is not Held.PREFIX
        if not alone:
            assert admission.cache.in_use_tokens <= limit + 1e-6, "more in use than there is"
        if not alone and new and not self.is_late(queued):
            wants = admission.cache.wanted_tokens + GROWTH_SHARE * admission.references.grows_tokens
            assert wants <= limit + 1e-6, "a new one, though not all that is counted on would fit"
        self.nobody_was_passed(queued, before, new=new)
        return queued

    def nobody_was_passed(self, queued: Queued, before: list[Passed], *, new: bool) -> None:
        if self.is_late(queued):
            return
        for other in before:
            if new and other.head and self.is_late(other.queued):
                assert other.held is not Held.CACHE, "a new one passed one that waited too long"
            if self.key(other.queued) > self.key(queued) or other.held is Held.PREFIX:
                continue
            if other.resident:
                assert other.held is Held.CACHE, "a resident was passed, though it might have gone"
            else:
                assert not new, "a new one passed another that was before it"

    def why_held(self, queued: Queued) -> Held | None:
        """Why a call could not go if it were a resident's."""
        admission, ask = self.scheduler.cache.admission, queued.call.ask
        now = self.background.clock()
        awaited = {
            piece for entry in admission._prefilling.values() if now < entry.open_at_s for piece in entry.handle.fresh
        }
        if not admission._entries:
            return None
        if sum(piece.tokens for piece in admission.cache.find(ask) if piece in awaited) >= GATE_TOKENS:
            return Held.PREFIX
        use, _ = admission.cache.adds(ask, queued.call.expected_answer_tokens)
        return Held.CACHE if admission.cache.in_use_tokens + use > admission.capacity.limit else None

    def is_late(self, queued: Queued) -> bool:
        return queued.call.arrived_s < self.background.clock() - PATIENCE_S

    def key(self, queued: Queued) -> tuple[Any, ...]:
        return (self.policies.stage.key(queued, self.background.clock()), queued.rank)

    # What happens

    @rule(
        workflow=st.sampled_from("uvwxyz"),
        stage=st.sampled_from("ab"),
        tokens=st.sampled_from([5, 60, 250, 2000]),
        answer=st.sampled_from([5.0, 100.0]),
        priority=st.sampled_from([0, 5]),
        nested=st.sampled_from([False] * 9 + [True]),
    )
    def call(self, workflow: str, stage: str, tokens: int, answer: float, priority: int, nested: bool) -> None:
        asked = [*self.said[workflow], {"role": "user", "content": f"{len(self.granted)} ".ljust(tokens * 4, "?")}]
        standing = self.standing[workflow]
        call = a_call(
            self.scheduler, workflow, asked, stage=stage, answer=answer, standing=standing, priority=priority
        )
        self.inside.append(queue(self.scheduler, call, holds_grant=nested))

    def one(self, data: st.DataObject, *, waiting: bool = False) -> Queued | None:
        some = [each for each in self.inside if each.waiting is waiting]
        return data.draw(st.sampled_from(some)) if some else None

    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        if queued := self.one(data):
            self.scheduler.first_token(queued)

    @rule(data=st.data(), found=st.sampled_from([None, 0.0, 1.0]), wrong=st.sampled_from([0.7, 1.0, 1.5]))
    def end(self, data: st.DataObject, found: float | None, wrong: float) -> None:
        if queued := self.one(data):
            prompt = int(self.scheduler.cache.admission.cache.tokens_of(queued.call.ask) * wrong) + 1
            self.gone(queued, usage=Usage(prompt, None if found is None else int(found * prompt), 20))
            told = [*queued.call.ask.messages, {"role": "assistant", "content": "so it is " * 8}]
            self.said[queued.call.identity.workflow] = told if len(told) < 9 else told[:1]

    @rule(data=st.data(), reached=st.booleans(), followed=st.booleans())
    def end_badly(self, data: st.DataObject, reached: bool, followed: bool) -> None:
        if queued := self.one(data):
            self.gone(queued, reached=reached, followed=followed)

    @rule(data=st.data(), followed=st.booleans())
    def cancel(self, data: st.DataObject, followed: bool) -> None:
        if queued := self.one(data, waiting=True):
            self.gone(queued, reached=False, followed=followed)

    def gone(self, queued: Queued, **how: Any) -> None:
        self.inside.remove(queued)
        for _ in range(2):
            leave(self.scheduler, queued, **how)

    @rule(workflow=st.sampled_from("uvwxyz"), verb=st.sampled_from([*Verb, None]))
    def run_ends(self, workflow: str, verb: Verb | None) -> None:
        if verb is not None:
            self.scheduler.apply(CacheAction(verb, workflow))
        self.scheduler.forget(workflow)

    @rule(workflow=st.sampled_from("uvwxyz"), doing=st.sampled_from([Doing.HUMAN, Doing.IDLE]), release=st.booleans())
    def turns(self, workflow: str, doing: Doing, release: bool) -> None:
        self.scheduler.turned(workflow, doing)
        if release:
            self.scheduler.apply(CacheAction(Verb.RELEASE, workflow))

    @rule()
    def engine_is_lost(self) -> None:
        self.scheduler.health.lost(BackendUnavailable("gone"))

    @rule(size=st.sampled_from([None, 150, 700, PLENTY]))
    def engine_changes(self, size: int | None) -> None:
        self.scheduler.adapter.says = Probe(kv_tokens=size, incarnation=f"{size}")
        self.scheduler.health._learn(self.scheduler.adapter.says)
        self.scheduler.go_on()

    @rule(policy=st.sampled_from(POLICIES), bound=st.none() | st.integers(1, 4))
    def rules_change(self, policy: str, bound: int | None) -> None:
        self.policies = policies("b", policy, policy)
        self.scheduler.queue.change_policies(self.policies, self.background.clock())
        self.scheduler.queue.max_concurrency = bound
        self.scheduler.go_on()

    @rule(seconds=st.sampled_from([0.05, 1.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.background.advance(seconds)

    # What must be so

    @invariant()
    def sound(self) -> None:
        self.scheduler.check_integrity()
        assert len(set(self.granted)) == len(self.granted)
        assert all(each.granted is (each in self.granted) for each in self.inside)
        flying = sum(each.granted for each in self.inside)
        assert self.scheduler.queue.in_flight == len(self.scheduler.cache.admission._entries) == flying
        assert flying or not self.scheduler.queue.waiting, "everybody waits, and nobody works"

    @invariant()
    def nobody_waits_for_good(self) -> None:
        held = [each for each in self.inside if each.waiting and each.held]
        assert not held or not self.scheduler.queue.has_room() or self.background.timers, "nothing will look again"

    def teardown(self) -> None:
        if not hasattr(self, "inside"):
            return
        for _ in range(len(self.inside)):
            for queued in [each for each in self.inside if each.granted]:
                self.gone(queued, reached=False)
            self.background.advance(31.0)
            self.sound()
        assert not self.inside, "bounded waiting"
        for workflow in self.said:
            self.scheduler.forget(workflow)
        now = self.scheduler.cache.admission.statistics()
        assert (now.in_use_tokens, now.wanted_tokens, now.growth_tokens, now.workflows) == (0, 0, 0, ())


AdmissionMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=50, deadline=None)
TestAdmission = AdmissionMachine.TestCase


# Where all fits

EVENTS = st.lists(
    st.one_of(
        st.tuples(
            st.just("enter"), st.sampled_from("uvwx"), st.sampled_from("abc"), st.integers(0, 3), st.integers(5, 150)
        ),
        st.tuples(st.just("end"), st.integers(0, 9), st.booleans(), st.booleans()),
        st.tuples(st.just("wait"), st.sampled_from([0.5, 40.0])),
    ),
    max_size=40,
)  # fmt: skip


def grants(kv_tokens: int | None, how: dict[str, Any], events: Sequence[tuple[Any, ...]]) -> list[tuple[float, int]]:
    scheduler, background = a_scheduler(kv_tokens, **how)
    standing = {name: RunShare(order=n) for n, name in enumerate("uvwx")}
    given: list[tuple[float, int]] = []
    inside: list[Queued] = []

    def grant(queued: Queued, now: float, *, extra: bool = False, real: Any = scheduler._grant) -> Queued:
        given.append((now, queued.order))
        return real(queued, now, extra=extra)  # type: ignore[no-any-return]

    scheduler._grant = grant  # type: ignore[method-assign]
    for what, *rest in events:
        if what == "enter":
            workflow, stage, priority, tokens = rest
            inside.append(
                enter(scheduler, workflow, tokens, stage=stage, priority=priority, standing=standing[workflow])
            )
        elif what == "end" and inside:
            nth, reached, followed = rest
            leave(scheduler, inside.pop(nth % len(inside)), reached=reached, followed=followed)
        elif what == "wait":
            background.advance(rest[0])
    return given


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(POLICIES), st.sampled_from(POLICIES), st.none() | st.integers(1, 3), EVENTS)
def test_where_all_fits_grants_are_the_same_as_without(
    stage: str, request_policy: str, bound: int | None, events: list[tuple[Any, ...]]
) -> None:
    how: dict[str, Any] = {"policy": stage, "request": request_policy}
    if bound:
        how["max_concurrency"] = bound
    assert grants(PLENTY, how, events) == grants(None, how, events)


# Under pressure


def test_a_resident_goes_before_a_new_one_that_came_before_it() -> None:
    scheduler, _ = a_scheduler(1000, grows=0)
    resident = enter(scheduler, "resident", 400)
    other = enter(scheduler, "other", 300, begins="z")
    new = enter(scheduler, "new", 300)
    leave(scheduler, resident)
    assert new.waiting and new.held == Held.CACHE, "what the resident left counts"
    again = enter(scheduler, "resident", 500)
    assert again.granted and new.waiting
    for queued in (again, other):
        leave(scheduler, queued, followed=False)
    assert new.granted


def test_growth_counts_and_is_released() -> None:
    scheduler, _ = a_scheduler(1000)
    first = enter(scheduler, "first", 250)
    assert scheduler.cache.admission.statistics().growth_tokens == pytest.approx(375, abs=5)
    second = enter(scheduler, "second", 250)
    assert second.waiting, "500 fit, but not what they will grow to"
    scheduler.apply(CacheAction(Verb.FLUSH, "first"))
    assert second.waiting, "its call is still in flight"
    leave(scheduler, first, followed=False)
    assert second.granted


def test_whoever_waits_longest_for_a_human_gives_way_but_not_for_a_short_tool() -> None:
    scheduler, background = a_scheduler(1000, grows=0)
    for name in ("tool", "human"):
        leave(scheduler, enter(scheduler, name, 150), usage=Usage(150, None, 1))
    references = scheduler.cache.admission.references.by_workflow
    enter(scheduler, "busy", 100)
    new = enter(scheduler, "new", 680)
    assert new.waiting and references["human"].holds, "tools come back"
    scheduler.turned("human", Doing.HUMAN)
    assert new.granted, "at once, not at the next call"
    assert not references["human"].holds and references["tool"].holds
    later = enter(scheduler, "later", 90)
    background.advance(PATIENCE_S - 0.1)
    assert later.waiting
    background.advance(0.1)
    assert later.granted and not references["tool"].holds, "that took too long"
    assert scheduler.cache.admission.statistics().lapsed == 2


def test_a_large_call_gets_its_room_after_a_while_and_nobody_passes_it_then() -> None:
    scheduler, background = a_scheduler(1000, policy="sjf", grows=0)
    small = [enter(scheduler, f"s{n}", 50, answer=1.0) for n in range(3)]
    large = enter(scheduler, "large", 950, stage="another")
    background.advance(5)
    passing = enter(scheduler, "passing", 50, answer=1.0)
    assert large.waiting and passing.granted
    background.advance(PATIENCE_S)
    behind = enter(scheduler, "behind", 50, answer=1.0)
    assert behind.waiting, "there would be room for it"
    for queued in (*small, passing):
        assert large.waiting
        leave(scheduler, queued, followed=False)
    assert large.granted
    leave(scheduler, large, followed=False)
    assert behind.granted


def test_a_call_larger_than_the_cache_goes_when_nothing_else_does() -> None:
    scheduler, _ = a_scheduler(100)
    assert enter(scheduler, "huge", 5000).granted


def test_a_call_that_did_not_fit_goes_once_another_one_ended() -> None:
    scheduler, _ = a_scheduler(4000)
    leave(scheduler, enter(scheduler, "w", 10))  # a resident: what calls use leaves room for it, or does not
    first, second = enter(scheduler, "u", 500), enter(scheduler, "v", 500)
    waits = enter(scheduler, "w", 3000)
    assert waits.waiting and not second.waiting
    leave(scheduler, first)
    assert not waits.waiting


def test_what_never_reached_the_engine_is_not_expected_there() -> None:
    scheduler, _ = a_scheduler(100_000)
    leave(scheduler, enter(scheduler, "w", 150), reached=False)
    again = enter(scheduler, "w", 150)
    assert scheduler.cache.admission._entries[again].handle.expected_tokens == 0


def test_a_lost_engine_teaches_nothing_about_its_size() -> None:
    scheduler, _ = a_scheduler(100_000)
    scheduler.cache.admission.capacity._caches = True
    leave(scheduler, enter(scheduler, "w", 500))
    again = enter(scheduler, "w", 500)
    scheduler.health.lost(BackendUnavailable("gone"))
    leave(scheduler, again, usage=Usage(500, 0, 5))
    assert scheduler.cache.admission.capacity.losses == 0


# The gate


def fan(
    scheduler: BackendScheduler, branches: int, *, prefix: int = 400, workflow: str = "w", stage: str = "worker"
) -> list[Queued]:
    policy = "p" * 4 * prefix
    return [
        queue(scheduler, a_call(scheduler, workflow, say(policy, f"part {n}"), stage=stage)) for n in range(branches)
    ]


@pytest.mark.parametrize("size", [None, PLENTY])
@pytest.mark.parametrize("how", ["first token", "end", "failure", "in time"])
def test_of_branches_with_one_prefix_one_goes_and_the_rest_follow(how: str, size: int | None) -> None:
    scheduler, background = a_scheduler(size)
    first, *rest = fan(scheduler, 8)
    assert first.granted and all(each.waiting and each.held == Held.PREFIX for each in rest)
    if how == "first token":
        scheduler.first_token(first)
    elif how == "end":
        leave(scheduler, first)
    elif how == "in time":
        background.advance(LENIENCE * 400 / PREFILL_TOKENS_PER_S / 2)
        assert all(each.waiting for each in rest)
        background.advance(LENIENCE * 400 / PREFILL_TOKENS_PER_S)
    if how == "failure":
        leave(scheduler, first, reached=False)
        assert [each.granted for each in rest] == [True] + [False] * 6, "the next one prefills for the others"
    else:
        assert all(each.granted for each in rest)


def test_a_cancelled_branch_lets_the_next_one_go_first() -> None:
    scheduler, _ = a_scheduler()
    first, second, third = fan(scheduler, 3)
    leave(scheduler, second, reached=False)
    leave(scheduler, first, reached=False)
    assert third.granted


def test_how_long_a_prefill_takes_is_learned() -> None:
    scheduler, background = a_scheduler()
    scheduler.speed_meter.speed = Speed(prefill_tokens_per_s=100.0)
    _, second = fan(scheduler, 2)
    background.advance(7.9)
    assert second.waiting
    background.advance(0.3)
    assert second.granted


def test_a_prefix_whose_prefill_is_done_gates_nobody_who_comes_later() -> None:
    scheduler, _ = a_scheduler()
    (first,) = fan(scheduler, 1)
    scheduler.first_token(first)
    (second,) = fan(scheduler, 1)
    assert second.granted


def test_short_prefixes_gate_nobody() -> None:
    scheduler, _ = a_scheduler()
    assert all(each.granted for each in fan(scheduler, 8, prefix=int(GATE_TOKENS) - 10))


@pytest.mark.parametrize("stage", ["worker", "another"])
def test_unrelated_calls_pass_those_that_wait_for_a_prefix(stage: str) -> None:
    scheduler, _ = a_scheduler()
    fan(scheduler, LOOK_AT - 1)
    assert enter(scheduler, "unrelated", 300, stage=stage).granted


# What a decision costs


def conversation(workflow: int, messages: int = 30) -> list[Message]:
    return say("policy " * 100, *(f"{workflow} {n} " * 10 for n in range(messages - 1)))


def test_a_decision_is_quick_with_ten_thousand_claims_and_a_thousand_calls_waiting() -> None:
    scheduler, background = a_scheduler(PLENTY)
    for number in range(10_000):
        call = a_call(scheduler, f"w{number}", conversation(number, 4), stage=f"s{number % 8}")
        leave(scheduler, queue(scheduler, call))
    scheduler.health._learn(Probe(kv_tokens=round(scheduler.cache.admission.cache.in_use_tokens) + 2000))
    flying = [enter(scheduler, f"f{n}", 100) for n in range(5)]
    for number in range(1_000):  # every other one a resident
        name = f"w{number}" if number % 2 else f"new{number}"
        queue(scheduler, a_call(scheduler, name, conversation(number, 30), stage=f"s{number % 8}"))
    assert scheduler.queue.waiting > 900 and flying
    now, times = background.clock(), []
    for _ in range(100):
        begin = time.thread_time()
        assert scheduler.cache.admission.choose(scheduler.queue, now, scheduler.speed_meter.speed) is None
        times.append(time.thread_time() - begin)
    lines = lines_run(lambda: scheduler.cache.admission.choose(scheduler.queue, now, scheduler.speed_meter.speed))
    print(f"choose: {1e3 * statistics.median(times):.3f} ms, {lines} lines")
    assert lines < 25_000, "a millisecond where this was written"
    assert statistics.median(times) < 1e-2, "and what C does in it is no more, even on a slow and busy machine"


def test_a_call_with_thirty_messages_costs_a_tenth_of_a_millisecond() -> None:
    scheduler, _ = a_scheduler(PLENTY)
    times = []
    for number in range(300):
        call = a_call(scheduler, f"w{number}", conversation(number))
        call.ask.pieces  # noqa: B018 - hashed in any case
        queued = scheduler.queue.enter(call, 0.0)
        begin = time.thread_time()
        assert scheduler.cache.admission.choose(scheduler.queue, 0.0, scheduler.speed_meter.speed) is queued
        scheduler.cache.admission.enter(queued, 0.0, None)
        scheduler.cache.admission.first_token(queued)
        scheduler.cache.admission.leave(queued, 0.0, Usage(500, 0, 9), reached=True, followed=True)
        times.append(time.thread_time() - begin)
        scheduler.queue.grant(queued)
        scheduler.queue.leave(queued)
    print(f"a call: {1e6 * statistics.median(times):.1f} us")
    assert statistics.median(times) < 1e-3, "0.1 ms, and much more for a slow and busy machine"


def test_a_call_outside_any_run_is_not_expected_to_grow() -> None:
    scheduler, _ = a_scheduler(1000)
    call = a_call(scheduler, "stray", say("x" * 1000))
    call.identity = replace(call.identity, run=None)
    assert queue(scheduler, call).granted
    assert scheduler.cache.admission.statistics().growth_tokens == 0


# Switched off -----------------------------------------------------------------------------------------------


def test_switched_off_it_holds_nobody_back_and_keeps_its_account() -> None:
    held, _ = a_scheduler(300, grows=0.0)
    waits = [enter(held, name, 200) for name in "ab"]
    assert [each.granted for each in waits] == [True, False], "two do not fit: this is what is switched off"
    clock = HandClock()
    chosen = policies("b", "fcfs", "fcfs")
    scheduler = BackendScheduler(
        Backend("b", "http://b/v1"),
        Engine(),
        HandBackground(clock),
        clock,
        chosen,
        Shared(Growth(0.0), admission=False),
    )
    scheduler.health._learn(Probe(kv_tokens=300))
    gone = [enter(scheduler, name, 200) for name in "ab"]
    alike = [enter(scheduler, name, 300, begins="the same") for name in "cd"]
    assert all(each.granted for each in (*gone, *alike)), "neither for the cache nor for a prefix"
    assert scheduler.statistics().admission.in_use_tokens > 300  # type: ignore[union-attr]
    for each in (*gone, *alike):
        leave(scheduler, each, followed=False)
    scheduler.check_integrity()
    assert scheduler.statistics().admission.in_use_tokens == 0  # type: ignore[union-attr]
