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
from orla_lg.core.cache.prefix.admission import GROWTH_SHARE, LENIENCE, LOOK_AT
from orla_lg.core.call import NO_HINTS, Ask, Call, Hints, Usage
from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.core.engine.speed import PREFILL_TOKENS_PER_S, Speed
from orla_lg.core.lookahead.estimates import Estimates
from orla_lg.core.memory.events import CacheAction, Doing, Verb
from orla_lg.core.policies import policies
from orla_lg.core.queues import Queued
from orla_lg.core.scheduler import Desk
from orla_lg.core.standing import Standing
from orla_lg.errors import BackendUnavailable
from tests.core.fakes import Engine, HandBackground, HandClock, identity

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


def a_desk(
    kv_tokens: int | None = None, *, policy: str = "fcfs", request: str | None = None, grows: float | None = None,
    **limits: Any,
) -> tuple[Desk, HandBackground]:  # fmt: skip
    clock = HandClock()
    background = HandBackground(clock)
    chosen = policies("b", policy, request or policy)
    desk = Desk(Backend("b", "http://b/v1", **limits), Engine(), background, clock, chosen, Growth(grows))
    desk.health._learn(Probe(kv_tokens=kv_tokens))
    return desk, background


def say(*texts: str) -> list[Message]:
    roles = ["system", *("user", "assistant") * len(texts)]
    return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=False)]


def a_call(
    desk: Desk, workflow: str, messages: Sequence[Message], *, stage: str = "node", answer: float = 10.0,
    standing: Standing | None = None, **hints: Any,
) -> Call:  # fmt: skip
    said = Hints(**hints) if hints else NO_HINTS
    ask = Ask("auto", list(messages))
    return Call(
        "c", identity(workflow, stage, f"run of {workflow}"), ask, said, said, desk._clock(), (),
        standing=standing or Standing(), answer_tokens=answer,
    )  # fmt: skip


def enter(desk: Desk, workflow: str, tokens: float = 100, *, begins: str = "", **more: Any) -> Queued:
    """A call with a prompt of so many tokens that begins like others or like none."""
    text = f"{begins or workflow} ".ljust(int(tokens * 4) - 5, "x")
    return queue(desk, a_call(desk, workflow, [{"role": "user", "content": text}], **more))


def queue(desk: Desk, call: Call, *, holds_grant: bool = False) -> Queued:
    return desk.enter(call, order=None, running=True, holds_grant=holds_grant)


def leave(
    desk: Desk, queued: Queued, *, reached: bool = True, followed: bool = True, usage: Usage | None = None
) -> None:
    desk.leave(queued, usage=usage, tokens=1 if reached else 0, followed=lambda: followed)


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
        self.desk, self.background = a_desk(size, policy=policy, **limits)
        self.policies = self.desk.queue.policies
        self.inside: list[Queued] = []
        self.granted: list[Queued] = []
        self.said = {name: say(LONG if name in "uvw" else SHORT) for name in "uvwxyz"}
        self.standing = {name: Standing(order=n) for n, name in enumerate("uvwxyz")}
        self.grant, self.desk._grant = self.desk._grant, self.judged  # type: ignore[method-assign]

    # Every grant

    def judged(self, queued: Queued, now: float, *, extra: bool = False) -> Queued:
        admission, limit = self.desk.cache.gate, self.desk.cache.gate.capacity.limit
        assert queued not in self.granted, "granted twice"
        self.granted.append(queued)
        new, alone = queued.call.identity.workflow not in admission.claims, not admission._entries
        waiting = [each for each in self.desk.queue if each is not queued]
        heads = set(self.desk.queue.heads())
        before = [
            Passed(each, self.why_held(each), each.call.identity.workflow in admission.claims, each in heads)
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
            wants = admission.cache.wanted_tokens + GROWTH_SHARE * admission.claims.grows_tokens
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
        admission, ask = self.desk.cache.gate, queued.call.ask
        now = self.background.clock()
        awaited = {
            piece for entry in admission._prefilling.values() if now < entry.open_at_s for piece in entry.stay.fresh
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
        call = a_call(self.desk, workflow, asked, stage=stage, answer=answer, standing=standing, priority=priority)
        self.inside.append(queue(self.desk, call, holds_grant=nested))

    def one(self, data: st.DataObject, *, waiting: bool = False) -> Queued | None:
        some = [each for each in self.inside if each.waiting is waiting]
        return data.draw(st.sampled_from(some)) if some else None

    @rule(data=st.data())
    def first_token(self, data: st.DataObject) -> None:
        if queued := self.one(data):
            self.desk.first_token(queued)

    @rule(data=st.data(), found=st.sampled_from([None, 0.0, 1.0]), wrong=st.sampled_from([0.7, 1.0, 1.5]))
    def end(self, data: st.DataObject, found: float | None, wrong: float) -> None:
        if queued := self.one(data):
            prompt = int(self.desk.cache.gate.cache.tokens_of(queued.call.ask) * wrong) + 1
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
            leave(self.desk, queued, **how)

    @rule(workflow=st.sampled_from("uvwxyz"), verb=st.sampled_from([*Verb, None]))
    def run_ends(self, workflow: str, verb: Verb | None) -> None:
        if verb is not None:
            self.desk.apply(CacheAction(verb, workflow))
        self.desk.forget(workflow)

    @rule(workflow=st.sampled_from("uvwxyz"), doing=st.sampled_from([Doing.HUMAN, Doing.IDLE]), release=st.booleans())
    def turns(self, workflow: str, doing: Doing, release: bool) -> None:
        self.desk.turned(workflow, doing)
        if release:
            self.desk.apply(CacheAction(Verb.RELEASE, workflow))

    @rule()
    def engine_is_lost(self) -> None:
        self.desk.health.lost(BackendUnavailable("gone"))

    @rule(size=st.sampled_from([None, 150, 700, PLENTY]))
    def engine_changes(self, size: int | None) -> None:
        self.desk.adapter.says = Probe(kv_tokens=size, incarnation=f"{size}")
        self.desk.health._learn(self.desk.adapter.says)
        self.desk.go_on()

    @rule(policy=st.sampled_from(POLICIES), bound=st.none() | st.integers(1, 4))
    def rules_change(self, policy: str, bound: int | None) -> None:
        self.policies = policies("b", policy, policy)
        self.desk.queue.change_policies(self.policies, self.background.clock())
        self.desk.queue.max_concurrency = bound
        self.desk.go_on()

    @rule(seconds=st.sampled_from([0.05, 1.0, 31.0]))
    def time_passes(self, seconds: float) -> None:
        self.background.advance(seconds)

    # What must be so

    @invariant()
    def sound(self) -> None:
        self.desk.check_integrity()
        assert len(set(self.granted)) == len(self.granted)
        assert all(each.granted is (each in self.granted) for each in self.inside)
        flying = sum(each.granted for each in self.inside)
        assert self.desk.queue.in_flight == len(self.desk.cache.gate._entries) == flying
        assert flying or not self.desk.queue.waiting, "everybody waits, and nobody works"

    @invariant()
    def nobody_waits_for_good(self) -> None:
        held = [each for each in self.inside if each.waiting and each.held]
        assert not held or not self.desk.queue.has_room() or self.background.timers, "nothing will look again"

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
            self.desk.forget(workflow)
        now = self.desk.cache.gate.statistics()
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
    desk, background = a_desk(kv_tokens, **how)
    standing = {name: Standing(order=n) for n, name in enumerate("uvwx")}
    given: list[tuple[float, int]] = []
    inside: list[Queued] = []

    def grant(queued: Queued, now: float, *, extra: bool = False, real: Any = desk._grant) -> Queued:
        given.append((now, queued.order))
        return real(queued, now, extra=extra)  # type: ignore[no-any-return]

    desk._grant = grant  # type: ignore[method-assign]
    for what, *rest in events:
        if what == "enter":
            workflow, stage, priority, tokens = rest
            inside.append(enter(desk, workflow, tokens, stage=stage, priority=priority, standing=standing[workflow]))
        elif what == "end" and inside:
            nth, reached, followed = rest
            leave(desk, inside.pop(nth % len(inside)), reached=reached, followed=followed)
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
    desk, _ = a_desk(1000, grows=0)
    resident = enter(desk, "resident", 400)
    other = enter(desk, "other", 300, begins="z")
    new = enter(desk, "new", 300)
    leave(desk, resident)
    assert new.waiting and new.held == Held.CACHE, "what the resident left counts"
    again = enter(desk, "resident", 500)
    assert again.granted and new.waiting
    for queued in (again, other):
        leave(desk, queued, followed=False)
    assert new.granted


def test_growth_counts_and_is_released() -> None:
    desk, _ = a_desk(1000)
    first = enter(desk, "first", 250)
    assert desk.cache.gate.statistics().growth_tokens == pytest.approx(375, abs=5)
    second = enter(desk, "second", 250)
    assert second.waiting, "500 fit, but not what they will grow to"
    desk.apply(CacheAction(Verb.FLUSH, "first"))
    assert second.waiting, "its call is still in flight"
    leave(desk, first, followed=False)
    assert second.granted


def test_whoever_waits_longest_for_a_human_gives_way_but_not_for_a_short_tool() -> None:
    desk, background = a_desk(1000, grows=0)
    for name in ("tool", "human"):
        leave(desk, enter(desk, name, 150), usage=Usage(150, None, 1))
    claims = desk.cache.gate.claims.by_workflow
    enter(desk, "busy", 100)
    new = enter(desk, "new", 680)
    assert new.waiting and claims["human"].holds, "tools come back"
    desk.turned("human", Doing.HUMAN)
    assert new.granted, "at once, not at the next call"
    assert not claims["human"].holds and claims["tool"].holds
    later = enter(desk, "later", 90)
    background.advance(PATIENCE_S - 0.1)
    assert later.waiting
    background.advance(0.1)
    assert later.granted and not claims["tool"].holds, "that took too long"
    assert desk.cache.gate.statistics().lapsed == 2


def test_a_large_call_gets_its_room_after_a_while_and_nobody_passes_it_then() -> None:
    desk, background = a_desk(1000, policy="sjf", grows=0)
    small = [enter(desk, f"s{n}", 50, answer=1.0) for n in range(3)]
    large = enter(desk, "large", 950, stage="another")
    background.advance(5)
    passing = enter(desk, "passing", 50, answer=1.0)
    assert large.waiting and passing.granted
    background.advance(PATIENCE_S)
    behind = enter(desk, "behind", 50, answer=1.0)
    assert behind.waiting, "there would be room for it"
    for queued in (*small, passing):
        assert large.waiting
        leave(desk, queued, followed=False)
    assert large.granted
    leave(desk, large, followed=False)
    assert behind.granted


def test_a_call_larger_than_the_cache_goes_when_nothing_else_does() -> None:
    desk, _ = a_desk(100)
    assert enter(desk, "huge", 5000).granted


def test_what_never_reached_the_engine_is_not_expected_there() -> None:
    desk, _ = a_desk(100_000)
    leave(desk, enter(desk, "w", 150), reached=False)
    again = enter(desk, "w", 150)
    assert desk.cache.gate._entries[again].stay.expected_tokens == 0


def test_a_lost_engine_teaches_nothing_about_its_size() -> None:
    desk, _ = a_desk(100_000)
    desk.cache.gate.capacity._caches = True
    leave(desk, enter(desk, "w", 500))
    again = enter(desk, "w", 500)
    desk.health.lost(BackendUnavailable("gone"))
    leave(desk, again, usage=Usage(500, 0, 5))
    assert desk.cache.gate.capacity.losses == 0


# The gate


def fan(desk: Desk, branches: int, *, prefix: int = 400, workflow: str = "w", stage: str = "worker") -> list[Queued]:
    policy = "p" * 4 * prefix
    return [queue(desk, a_call(desk, workflow, say(policy, f"part {n}"), stage=stage)) for n in range(branches)]


@pytest.mark.parametrize("size", [None, PLENTY])
@pytest.mark.parametrize("how", ["first token", "end", "failure", "in time"])
def test_of_branches_with_one_prefix_one_goes_and_the_rest_follow(how: str, size: int | None) -> None:
    desk, background = a_desk(size)
    first, *rest = fan(desk, 8)
    assert first.granted and all(each.waiting and each.held == Held.PREFIX for each in rest)
    if how == "first token":
        desk.first_token(first)
    elif how == "end":
        leave(desk, first)
    elif how == "in time":
        background.advance(LENIENCE * 400 / PREFILL_TOKENS_PER_S / 2)
        assert all(each.waiting for each in rest)
        background.advance(LENIENCE * 400 / PREFILL_TOKENS_PER_S)
    if how == "failure":
        leave(desk, first, reached=False)
        assert [each.granted for each in rest] == [True] + [False] * 6, "the next one prefills for the others"
    else:
        assert all(each.granted for each in rest)


def test_a_cancelled_branch_lets_the_next_one_go_first() -> None:
    desk, _ = a_desk()
    first, second, third = fan(desk, 3)
    leave(desk, second, reached=False)
    leave(desk, first, reached=False)
    assert third.granted


def test_how_long_a_prefill_takes_is_learned() -> None:
    desk, background = a_desk()
    desk.pace.speed = Speed(prefill_tokens_per_s=100.0)
    _, second = fan(desk, 2)
    background.advance(7.9)
    assert second.waiting
    background.advance(0.3)
    assert second.granted


def test_a_prefix_whose_prefill_is_done_gates_nobody_who_comes_later() -> None:
    desk, _ = a_desk()
    (first,) = fan(desk, 1)
    desk.first_token(first)
    (second,) = fan(desk, 1)
    assert second.granted


def test_short_prefixes_gate_nobody() -> None:
    desk, _ = a_desk()
    assert all(each.granted for each in fan(desk, 8, prefix=int(GATE_TOKENS) - 10))


@pytest.mark.parametrize("stage", ["worker", "another"])
def test_unrelated_calls_pass_those_that_wait_for_a_prefix(stage: str) -> None:
    desk, _ = a_desk()
    fan(desk, LOOK_AT - 1)
    assert enter(desk, "unrelated", 300, stage=stage).granted


# What a decision costs


def conversation(workflow: int, messages: int = 30) -> list[Message]:
    return say("policy " * 100, *(f"{workflow} {n} " * 10 for n in range(messages - 1)))


def test_a_decision_takes_less_than_a_millisecond_with_ten_thousand_claims_and_a_thousand_calls_waiting() -> None:
    desk, background = a_desk(PLENTY)
    for number in range(10_000):
        call = a_call(desk, f"w{number}", conversation(number, 4), stage=f"s{number % 8}")
        leave(desk, queue(desk, call))
    desk.health._learn(Probe(kv_tokens=round(desk.cache.gate.cache.in_use_tokens) + 2000))
    flying = [enter(desk, f"f{n}", 100) for n in range(5)]
    for number in range(1_000):  # every other one a resident
        name = f"w{number}" if number % 2 else f"new{number}"
        queue(desk, a_call(desk, name, conversation(number, 30), stage=f"s{number % 8}"))
    assert desk.queue.waiting > 900 and flying
    now, times = background.clock(), []
    for _ in range(100):
        begin = time.thread_time()
        assert desk.cache.gate.choose(desk.queue, now, desk.pace.speed) is None
        times.append(time.thread_time() - begin)
    print(f"choose: {1e3 * statistics.median(times):.3f} ms")
    assert statistics.median(times) < 2e-3, "1 ms, and as much again for a busy machine"


def test_a_call_with_thirty_messages_costs_a_tenth_of_a_millisecond() -> None:
    desk, _ = a_desk(PLENTY)
    times = []
    for number in range(300):
        call = a_call(desk, f"w{number}", conversation(number))
        call.ask.pieces  # noqa: B018 - hashed in any case
        queued = desk.queue.enter(call, 0.0)
        begin = time.thread_time()
        assert desk.cache.gate.choose(desk.queue, 0.0, desk.pace.speed) is queued
        desk.cache.gate.enter(queued, 0.0, None)
        desk.cache.gate.first_token(queued)
        desk.cache.gate.leave(queued, 0.0, Usage(500, 0, 9), reached=True, followed=True)
        times.append(time.thread_time() - begin)
        desk.queue.grant(queued)
        desk.queue.leave(queued)
    print(f"a call: {1e6 * statistics.median(times):.1f} us")
    assert statistics.median(times) < 2e-4, "0.1 ms, and as much again for a busy machine"


def test_a_call_outside_any_run_is_not_expected_to_grow() -> None:
    desk, _ = a_desk(1000)
    call = a_call(desk, "stray", say("x" * 1000))
    call.identity = replace(call.identity, run=None)
    assert queue(desk, call).granted
    assert desk.cache.gate.statistics().growth_tokens == 0


# Switched off -----------------------------------------------------------------------------------------------


def test_switched_off_it_holds_nobody_back_and_keeps_its_account() -> None:
    held, _ = a_desk(300, grows=0.0)
    waits = [enter(held, name, 200) for name in "ab"]
    assert [each.granted for each in waits] == [True, False], "two do not fit: this is what is switched off"
    clock = HandClock()
    chosen = policies("b", "fcfs", "fcfs")
    desk = Desk(
        Backend("b", "http://b/v1"), Engine(), HandBackground(clock), clock, chosen, Growth(0.0), admission=False
    )
    desk.health._learn(Probe(kv_tokens=300))
    gone = [enter(desk, name, 200) for name in "ab"]
    alike = [enter(desk, name, 300, begins="the same") for name in "cd"]
    assert all(each.granted for each in (*gone, *alike)), "neither for the cache nor for a prefix"
    assert desk.statistics().admission.in_use_tokens > 300  # type: ignore[union-attr]
    for each in (*gone, *alike):
        leave(desk, each, followed=False)
    desk.check_integrity()
    assert desk.statistics().admission.in_use_tokens == 0  # type: ignore[union-attr]
