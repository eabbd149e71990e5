"""Split prompts by hand: what is kept of a next prompt, when it is prefilled, and what came of it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from orla_lg.core.call import Ask, Usage
from orla_lg.core.engine.backend import Effect
from orla_lg.core.engine.capabilities import Warmed
from orla_lg.core.memory.events import CacheAction, CacheEvent, EventKind, Returns, SplitPrompt, Verb
from orla_lg.core.memory.policies import WarmSplit, default, rules_for
from orla_lg.core.memory.returns import ReturnBook
from orla_lg.core.prefetch.book import WarmUp
from orla_lg.core.prefetch.prompts import AGAIN_AFTER, Prompt, PromptBook
from orla_lg.core.workflow import Outcome
from tests.core.prefetch.test_prefetcher import SHARED, SLOTS, Bench

ANSWER = {"role": "assistant", "content": None, "tool_calls": [{"id": "a"}]}
LONG = "word " * 800
"""1,000 tokens."""


def result(name: str, text: str = LONG) -> dict[str, str]:
    return {"content": f"{name} {text}", "role": "tool", "tool_call_id": name}


class SplitBench(Bench):
    """A bench on which a call of thread *t* asked for tools."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.asked = self.call(self.run("t"), "hello", tokens=1000)

    @property
    def state(self) -> Any:
        return self.serving.book.run(f"r{self.runs}")

    def split(self, *results: Any, running: tuple[tuple[str, float], ...] = (("slow", 0.1),), **more: Any) -> bool:
        following = SplitPrompt(
            self.asked.id, "t", "b", ("graph", "node"), [ANSWER, *results], len(results), running, **more
        )
        return self.serving.progress.prompt_split(self.state, following)

    def wish(self, within_s: float | None = None) -> None:
        self.scheduler.apply(
            CacheAction(Verb.WARM, "t", "b", graph="graph", stage="node", next_of=self.asked.id, within_s=within_s)
        )
        self.wait()

    @property
    def sent(self) -> list[list[Any]]:
        self.background.do_all()
        self.wait()
        self.background.do_all()
        return [body["messages"] for body in self.engine.bodies]


@pytest.mark.parametrize("probe", [SHARED, SLOTS], ids=["shared", "slots"])
def test_what_is_certain_is_prefilled_and_found(probe: Any) -> None:
    bench = SplitBench(probe, says=Warmed(Effect.WARMED, Usage(prompt_tokens=2050, cached_tokens=1000)))
    own = bench.scheduler.prefetcher.prompts.last.get("t")
    assert own is not None
    assert bench.split() and bench.split(result("a"))
    bench.wish()
    assert bench.sent == [[*own.body["messages"], ANSWER, result("a")]]
    assert bench.scheduler.prefetcher.prompts.last.get("t") is own, "the workflow's own last prompt stays beside it"
    bench.serving.check_integrity()

    messages = [*own.body["messages"], ANSWER, result("a"), result("b")]
    ask = Ask("auto", messages)
    bench.scheduler.prefetcher.book.called("t", ask.prefix, 2040)
    said = bench.said
    assert (said.split_started, said.split_warmed_tokens, said.split_used_tokens) == (1, 1050, 1040)
    assert (said.warmed_tokens, said.used_tokens, said.wasted_tokens) == (1050, 1040, 10)


def test_before_the_first_result_and_after_the_last_nothing_is_signalled() -> None:
    bench = SplitBench()
    heard: list[CacheEvent] = []
    bench.serving.memory.signal = heard.extend  # type: ignore[method-assign,assignment]
    assert bench.split()
    assert bench.split(result("a"), running=())
    assert heard == []
    assert bench.split(result("a"))
    (event,) = heard
    assert (event.kind, event.workflow, event.backend, event.call) == (EventKind.TOOL_ENDED, "t", "b", bench.asked.id)
    assert (event.graph, event.stage, event.running) == ("graph", "node", (("slow", 0.1),))


def test_more_results_make_it_longer_and_what_runs_is_not_begun_twice() -> None:
    bench = SplitBench()
    bench.split()
    bench.split(result("a"))
    bench.wish()
    bench.wish()
    bench.split(result("a"), result("b"))
    bench.wish()
    assert [len(messages) for messages in bench.sent] == [4, 5]
    assert bench.said.split_started == 2
    bench.serving.check_integrity()


@pytest.mark.parametrize(
    ("within_s", "refused"), [(0.02, "short_wait"), (0.9, "short_wait"), (1.5, None), (None, None), (30.0, None)]
)
def test_where_the_wait_is_short_nothing_is_sent(within_s: float | None, refused: str | None) -> None:
    bench = SplitBench()  # 1,000 tokens a second, as nothing is known
    bench.split(result("a"))
    bench.wish(within_s)
    assert bench.said.refused == ({} if refused is None else {refused: 1})
    assert len(bench.sent) == (refused is None)


def test_the_next_call_of_the_stage_gives_it_up_and_one_of_another_stage_does_not() -> None:
    bench = SplitBench(SHARED, max_concurrency=8)
    bench.split(result("a"))
    bench.wish()
    state = bench.state
    bench.call(state.id, "sub", stage="helper", tokens=50)
    assert bench.said.given_up == 0 and bench.scheduler.prefetcher.running is not None
    bench.call(state.id, "hello", "again")
    assert bench.said.given_up == 1 and not bench.scheduler.prefetcher.prompts.split
    bench.wait()
    assert bench.scheduler.prefetcher.running is None, "nor does it begin again"
    assert not bench.split(result("a")), "that call is over"
    bench.serving.check_integrity()


def test_a_call_inside_a_tool_does_not_take_the_prompt_away() -> None:
    """The newest prompt of the workflow is then that call's."""
    bench = SplitBench(SHARED, max_concurrency=8)
    assert bench.split(), "when the first tool starts"
    bench.call(bench.state.id, "sub", stage="helper", tokens=50)
    assert bench.split(result("a"))
    bench.wish()
    assert len(bench.sent[0]) == 4


def test_an_engine_that_refuses_one_is_asked_again_after_some_calls() -> None:
    bench = SplitBench(says=Warmed(Effect.FAILED))
    assert bench.split(result("a"))
    bench.wish()
    assert len(bench.sent) == 1 and bench.said.failed == 1
    assert [bench.split(result("a")) for _ in range(AGAIN_AFTER + 1)] == [False] * AGAIN_AFTER + [True]


@pytest.mark.parametrize("outcome", list(Outcome))
def test_a_run_that_ends_leaves_nothing(outcome: Outcome) -> None:
    bench = SplitBench()
    bench.split(result("a"))
    bench.wish()
    bench.serving.progress.run_ended(f"r{bench.runs}", outcome)
    bench.serving.progress.thread_deleted("t")
    assert bench.scheduler.prefetcher.running is None
    prompts = bench.scheduler.prefetcher.prompts
    assert (len(prompts.last), prompts.chars, prompts.split) == (0, 0, set())
    bench.serving.check_integrity()


def test_a_part_of_a_result_counts_for_the_call_that_has_all_of_it() -> None:
    bench = SplitBench(says=Warmed(Effect.WARMED, Usage(prompt_tokens=1900, cached_tokens=1000)))
    own = bench.scheduler.prefetcher.prompts.last.get("t")
    assert own is not None
    bench.split(result("a", "word " * 700), partly=True)
    bench.wish()
    assert len(bench.sent) == 1
    bench.scheduler.prefetcher.book.called(
        "t", Ask("auto", [*own.body["messages"], ANSWER, result("a")]).prefix, 1890
    )
    assert (bench.said.split_warmed_tokens, bench.said.split_used_tokens) == (900, 890)


def test_without_warm_ups_nothing_is_kept() -> None:
    bench = SplitBench(warm_up=None)
    assert not bench.split(result("a"))


def test_what_is_kept_is_bounded() -> None:
    bench = SplitBench(warm_up=WarmUp(keep_chars=30_000))
    assert bench.split(result("a"))
    assert not bench.split(result("a", "x" * 40_000)), "too long to be kept"
    assert bench.scheduler.prefetcher.prompts.chars <= 30_000


# The rule


def event(usual_s: float | None, *, chance: float = 0.9, running: Any = (("slow", 0.0),)) -> CacheEvent:
    returns = Returns(chance, usual_s)
    return CacheEvent(
        EventKind.TOOL_ENDED, "w", "b", graph="g", stage="s", call="c", running=running, returns=returns
    )


def test_how_many_run_at_once_comes_to_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    bench, seen = SplitBench(SHARED), list[CacheEvent]()
    for _ in range(4):
        bench.serving.progress.tool_ended(bench.state, "node", "slow", 1.0)
    monkeypatch.setattr(bench.serving.memory, "policy", Policy(seen))
    for at_once in (0, 1):
        bench.split(result("a"), running=(("slow", 0.0), ("slow", 0.0)), at_once=at_once)
    beside, in_turn = [each.returns.usual_s for each in seen if each.returns is not None and each.returns.usual_s]
    assert in_turn == pytest.approx(2 * beside)


def test_the_rule_waits_for_what_ends_together_and_longer_where_nothing_is_known() -> None:
    (action,) = WarmSplit().decide(event(4.0))
    assert (action.verb, action.graph, action.stage, action.next_of) == (Verb.WARM, "g", "s", "c")
    assert (action.after_s, action.within_s, action.chance) == (0.02, 3.98, 0.9)
    (action,) = WarmSplit().decide(event(None))
    assert (action.after_s, action.within_s) == (0.5, None)
    assert WarmSplit().decide(event(0.01)) == WarmSplit().decide(event(4.0, running=())) == ()
    assert WarmSplit().decide(replace(event(4.0), kind=EventKind.TOOL_STARTED)) == ()


def test_it_is_in_the_default_and_heeds_one_event_only() -> None:
    assert [type(rule) for rule in rules_for(default(), EventKind.TOOL_ENDED)] == [WarmSplit]
    assert {EventKind.TOOL_ENDED} == WarmSplit.KINDS


class Policy:
    """Notes what it is asked about tools that ended."""

    def __init__(self, seen: list[CacheEvent]) -> None:
        self._seen = seen

    def decide(self, event: CacheEvent) -> tuple[CacheAction, ...]:
        if event.kind is EventKind.TOOL_ENDED:
            self._seen.append(event)
        return ()


# How long tools still run


def book_of(*seconds: float, tool: str = "slow") -> ReturnBook:
    book = ReturnBook()
    for took_s in seconds:
        book.used("w", tool, took_s)
    return book


def test_the_rest_of_a_tool_is_the_half_of_those_that_took_longer() -> None:
    book = book_of(*[1.0] * 9, 20.0)
    fresh, late = book.rest([("slow", 0.0)]), book.rest([("slow", 3.0)])
    assert fresh.usual_s is not None and 0.6 < fresh.usual_s < 1.28
    assert late.usual_s is not None and 10.0 < late.usual_s < 40.0, (
        "one that takes longer than usual may be the other kind"
    )
    assert book.rest([("slow", 100.0)]).usual_s is None, "none took so long"
    assert book.rest([("other", 0.0)]) == Returns(0.95)


def test_the_last_of_several_counts() -> None:
    book = book_of(*[1.0] * 4)
    for _ in range(4):
        book.used("w", "slower", 8.0)
    both = book.rest([("slow", 0.0), ("slower", 0.0), ("unknown", 0.0)]).usual_s
    assert both == book.rest([("slower", 0.0)]).usual_s and both is not None and 5.0 < both < 10.0
    assert book.rest([]) == Returns()


def test_tools_that_run_one_after_the_other_take_the_sum_of_what_is_to_come() -> None:
    book = book_of(*[1.0] * 4)
    slow = book.rest([("slow", 0.0)]).usual_s
    late = book.rest([("slow", 0.5)]).usual_s
    assert slow is not None and late is not None and late < slow
    to_come = [("slow", 0.0)] * 3
    assert book.rest(to_come, 1).usual_s == pytest.approx(3 * slow)
    assert book.rest(to_come, 2).usual_s == pytest.approx(2 * slow), "two, and then the third"
    assert book.rest(to_come, 3) == book.rest(to_come, 9) == book.rest(to_come) == book.rest(to_come[:1])
    assert book.rest([("slow", 0.5), *to_come[:1]], 1).usual_s == pytest.approx(late + slow), "one runs already"
    began = book.rest([("slow", 0.0), ("slow", 0.5)], 1).usual_s
    assert began == pytest.approx(max(slow, late)), "one that began before its turn runs beside those before it"
    assert book.rest([("slow", 0.0), ("unknown", 0.0)], 1).usual_s == slow, "and longer, but nothing says how much"


def test_the_rest_is_no_more_than_the_longest_seen() -> None:
    for took_s in (0.005, 0.3, 1.0, 7.0, 1e6):
        book = book_of(took_s)
        for ran_s in (0.0, took_s / 2, took_s * 0.99, took_s * 4, 1e9):
            rest = book.rest([("slow", ran_s)]).usual_s
            assert rest is None or 0 <= rest <= 2 * took_s + 0.01


# The book of prompts, against a plain model


class Prompts(RuleBasedStateMachine):
    """Calls come, tools end in any order, workflows are over: what is kept is what was certain last."""

    workflows = st.sampled_from("uvw")
    stages = st.sampled_from([("g", "a"), ("g", "b")])

    def __init__(self) -> None:
        super().__init__()
        self.book = PromptBook(8_000)
        self.last: dict[str, str] = {}
        self.next: dict[Any, tuple[str, int]] = {}
        self.calls = 0

    @rule(workflow=workflows, stage=stages)
    def call(self, workflow: str, stage: tuple[str, str]) -> None:
        self.calls += 1
        said = [{"role": "user", "content": f"{workflow} {self.calls}"}]
        self.book.came(workflow, stage)
        self.next.pop((workflow, stage), None)
        prompt = Prompt(f"c{self.calls}", *stage, Ask("m", said), {"messages": said}, 50, 12)
        self.book.last.put(workflow, prompt)
        self.last[workflow] = prompt.call_id

    @precondition(lambda self: self.calls)
    @rule(
        workflow=workflows, stage=stages, back=st.integers(0, 2), results=st.integers(0, 3), chars=st.integers(0, 200)
    )
    def extend(self, workflow: str, stage: tuple[str, str], back: int, results: int, chars: int) -> None:
        call = f"c{self.calls - back}"
        messages = [ANSWER, *(result(str(n), "x" * chars) for n in range(results))]
        kept = self.book.extend(SplitPrompt(call, workflow, "b", stage, messages, results))
        known = self.last.get(workflow) == call or self.next.get((workflow, stage), ("", 0))[0] == call
        assert kept == known
        if kept:
            self.next[workflow, stage] = call, 2 + results

    @rule(workflow=workflows)
    def over(self, workflow: str) -> None:
        self.book.forget(workflow)
        self.last.pop(workflow, None)
        self.next = {key: kept for key, kept in self.next.items() if key[0] != workflow}

    @invariant()
    def agrees(self) -> None:
        assert self.book.split == set(self.next)
        for (workflow, stage), (call, length) in self.next.items():
            prompt = self.book.next(workflow, stage, call)
            assert prompt is not None and len(prompt.body["messages"]) == len(prompt.ask.prefix) == length
            assert prompt.base is not None and prompt.ask.prefix[:1] == prompt.base.ask.prefix
            assert self.book.next(workflow, stage, "another") is None
        assert self.book.last.chars == sum(prompt.chars for prompt in self.book.last.newest())
        assert self.book.chars <= 8_000


TestPrompts = Prompts.TestCase
TestPrompts.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
