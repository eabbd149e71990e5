from __future__ import annotations

import asyncio
import math
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from orla_lg.core.call import Ask, Usage
from orla_lg.core.engine.backend import Cost
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import arrive, serve
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.limits import CONFIGURABLE, NO_LIMITS, Limit, Limits, LimitScope
from orla_lg.core.limits.usage import NOTHING, SLICES, Amount, UsageAccount
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Sleep, WaitForTurn, drive
from orla_lg.core.workflow import Outcome
from orla_lg.errors import BudgetExceeded, ConfigError, DeadlineExceeded
from tests.core.fakes import HandClock, Sender, a_call, a_serving, identity, is_quiet, step

DOLLAR_A_TOKEN = Cost(1e6, 1e6)
PROMPT_TOKENS = 2
FIGURES = ("calls", "tokens", "cost_usd")


def limited(limits: Limits, clock: HandClock | None = None, **backend: Any) -> Serving:
    serving = a_serving(clock=clock or HandClock(), cost=DOLLAR_A_TOKEN, **backend)
    serving.limits.shared = limits
    return serving


def ask(
    serving: Serving, stage: str = "a", run: str | None = None, max_tokens: int | None = 10,
    layers: tuple[LimitScope, ...] = (), **hints: Any,
) -> InFlightCall:  # fmt: skip
    said = a_call(**hints).said
    prompt = Ask("auto", [{"role": "user", "content": "hello"}], max_tokens=max_tokens)
    who = identity(run or "w", stage, run)
    return arrive(serving.services, who, prompt, call_id=serving.new_id(), said=said, layers=layers)


def begin(serving: Serving, arrived: InFlightCall, *script: Any) -> InFlightCall:
    (inflight,) = step(serve(arrived, Sender(*(script or ("stream",)))))
    assert isinstance(inflight, InFlightCall)
    return inflight


def use(serving: Serving, tokens: int = 12, **who: Any) -> None:
    """Make a call that uses so many tokens."""
    inflight = begin(serving, ask(serving, **who))
    inflight.saw(Usage(PROMPT_TOKENS, None, tokens - PROMPT_TOKENS))
    inflight.finish()


def promised(serving: Serving) -> list[tuple[str, str, Amount]]:
    return [
        (each.scope, each.name, each.promised) for each in serving.statistics().limits if each.promised != NOTHING
    ]


# The machine: calls on every way through the core, against sums made anew each time

WINDOW_S = 60.0
BOUNDS = st.builds(
    Limit,
    calls=st.none() | st.integers(0, 4),
    tokens=st.none() | st.integers(0, 200),
    cost_usd=st.none() | st.integers(0, 200),
)
LIMITS = st.tuples(st.none() | BOUNDS, st.none() | BOUNDS, st.none() | BOUNDS)
Key = tuple[str, str]


@dataclass
class Known:
    """A call under way, as the model knows it."""

    steps: Any
    keys: list[Key]
    asked: tuple[float, float, float]
    run: str
    until_s: float
    inflight: InFlightCall | None = None
    wait: Any = None


@dataclass
class Book:
    """What ended under one limit, and when."""

    entries: list[tuple[float, tuple[float, float, float]]] = field(default_factory=list)


class LimitMachine(RuleBasedStateMachine):
    """Never more than a limit is spent and promised; a call is refused only if it would be; all is given back."""

    @initialize(stage_window=st.booleans(), wall_s=st.none() | st.just(100.0), limits=LIMITS)
    def start(self, stage_window: bool, wall_s: float | None, limits: tuple[Limit | None, ...]) -> None:
        self.clock = HandClock()
        self.serving = limited(NO_LIMITS, self.clock, max_concurrency=2)
        self.windows = {"run": None, "stage": WINDOW_S if stage_window else None, "tenant": WINDOW_S}
        self.wall_s = wall_s
        self.limits: dict[str, Limit | None] = {"run": None, "stage": None, "tenant": None}
        self.books: dict[Key, Book] = {}
        self.calls: list[Known] = []
        self.runs = [f"r{n}" for n in range(2)]
        self.began: dict[str, float] = {}
        for run in self.runs:
            self.open_run(run)
        self.change(limits)

    def open_run(self, run: str) -> None:
        self.began[run] = self.clock.now
        self.serving.progress.run_started(run, thread=None)

    @rule(limits=LIMITS)
    def change(self, limits: tuple[Limit | None, ...]) -> None:
        for (kind, per_s), limit in zip(self.windows.items(), limits, strict=True):
            empty = limit is None or all(getattr(limit, name) is None for name in FIGURES)
            self.limits[kind] = None if limit is None or empty else replace(limit, per_s=per_s)
        if (run := self.limits["run"]) is not None:
            self.limits["run"] = replace(run, wall_s=self.wall_s)
        stage, tenant = self.limits["stage"], self.limits["tenant"]
        self.serving.limits.shared = Limits(
            self.limits["run"], {"*": stage} if stage else {}, {"t": tenant} if tenant else {}
        )

    @rule(seconds=st.sampled_from([0.0, 1.0, 55.0, 61.5]))
    def wait(self, seconds: float) -> None:
        self.clock.now += seconds

    def sums(self, key: Key, since_s: float) -> list[float]:
        ended = [amount for at, amount in self.books.setdefault(key, Book()).entries if at >= since_s]
        under_way = [call.asked for call in self.calls if key in call.keys]
        return [sum(each) for each in zip((0.0, 0.0, 0.0), *ended, *under_way, strict=True)]

    def excess(self, due: dict[Key, Limit], asked: tuple[float, ...], *, late: bool) -> bool:
        for key, limit in due.items():
            window = self.windows[key[0]] or math.inf
            since = self.clock.now - window * (1 + late / SLICES)
            for name, now, more in zip(FIGURES, self.sums(key, since), asked, strict=True):
                bound = getattr(limit, name)
                if bound is not None and now + more > bound:
                    return True
        return False

    @rule(
        run=st.integers(0, 1), stage=st.sampled_from("ab"), tenant=st.sampled_from([None, "t", "u"]),
        bound=st.sampled_from([10, 40, 90]),
    )  # fmt: skip
    def arrive(self, run: int, stage: str, tenant: str | None, bound: int) -> None:
        who = self.runs[run]
        inflight = ask(self.serving, stage, who, bound, **({"tenant": tenant} if tenant else {}))
        tokens = PROMPT_TOKENS + round(min(inflight.call.answer_tokens, bound))
        asked = (1, tokens, tokens)
        named = {"run": who, "stage": stage, "tenant": tenant if tenant == "t" else None}
        due = {(kind, name): limit for kind, name in named.items() if name and (limit := self.limits[kind])}
        walled = self.wall_s is not None and ("run", who) in due
        until_s = self.began[who] + self.wall_s if walled and self.wall_s else math.inf
        known = Known(serve(inflight, Sender("stream")), list(due), asked, who, until_s)
        try:
            self.went(known, step(known.steps))
        except BudgetExceeded as refused:
            assert self.clock.now >= until_s or self.excess(due, asked, late=True), refused
        else:
            assert self.clock.now < until_s and not self.excess(due, asked, late=False), "let in beyond a limit"
            self.calls.append(known)

    def went(self, known: Known, effect: Any) -> None:
        if isinstance(effect, WaitForTurn):
            known.wait = effect
        else:
            (known.inflight,), known.wait = effect, None

    def ended(self, known: Known, spent: tuple[float, float, float] | None) -> None:
        self.calls.remove(known)
        for key in known.keys if spent else ():
            self.books.setdefault(key, Book()).entries.append((self.clock.now, spent))  # type: ignore[arg-type]
        for waiting in [call for call in self.calls if call.wait is not None and call.wait.turn.settled]:
            self.went(waiting, step(waiting.steps))

    def served(self) -> list[Known]:
        return [call for call in self.calls if call.inflight is not None]

    def queued(self) -> list[Known]:
        return [call for call in self.calls if call.wait is not None]

    @precondition(lambda self: self.served())
    @rule(data=st.data(), how=st.sampled_from(["used", "uncounted", "failed", "broken"]), answer=st.integers(1, 99))
    def end(self, data: st.DataObject, how: str, answer: int) -> None:
        known = data.draw(st.sampled_from(self.served()))
        assert known.inflight is not None
        if how == "used":
            known.inflight.saw(Usage(PROMPT_TOKENS, 0, answer))
        elif how == "broken":
            known.inflight.first_token()
        known.inflight.finish(None if how in ("used", "uncounted") else ConnectionError(how))
        known.inflight.finish()
        tokens = PROMPT_TOKENS + answer
        self.ended(known, {"used": (1, tokens, tokens), "failed": None}.get(how, known.asked))

    @precondition(lambda self: self.queued())
    @rule(data=st.data(), how=st.sampled_from([asyncio.CancelledError, GeneratorExit, TimeoutError]))
    def leave(self, data: st.DataObject, how: type[BaseException]) -> None:
        known = data.draw(st.sampled_from(self.queued()))
        late = known.until_s <= self.clock.now
        if how is TimeoutError and known.until_s == math.inf:
            return
        if how is GeneratorExit:
            known.steps.close()
        else:
            expected = BudgetExceeded if how is TimeoutError else how
            self.clock.now += 0 if late or how is not TimeoutError else known.until_s - self.clock.now
            with pytest.raises(expected):
                step(known.steps, how())
        self.ended(known, None)

    @rule(which=st.integers(0, 1))
    def another_run(self, which: int) -> None:
        self.serving.progress.run_ended(self.runs[which], Outcome.DONE)
        self.runs[which] = f"r{len(self.began)}"
        self.open_run(self.runs[which])

    @invariant()
    def sound(self) -> None:
        self.serving.check_integrity()
        for each in self.serving.statistics().limits:
            under_way = [call.asked for call in self.calls if (each.scope, each.name) in call.keys]
            sums = tuple(sum(parts) for parts in zip((0, 0, 0), *under_way, strict=True))
            assert tuple(getattr(each.promised, name) for name in FIGURES) == sums
            if self.windows[each.scope] is None:
                total = self.sums((each.scope, each.name), -math.inf)
                spent = [whole - part for whole, part in zip(total, sums, strict=True)]
                assert [getattr(each.spent, name) for name in FIGURES] == spent

    def teardown(self) -> None:
        for known in [*self.queued(), *self.served()]:
            known.inflight.finish("x") if known.inflight is not None else known.steps.close()
        assert promised(self.serving) == [] and is_quiet(self.serving)


LimitMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=50, deadline=None)
TestLimits = LimitMachine.TestCase


# What is counted


def test_calls_under_way_count_so_that_many_at_once_cannot_slip_through() -> None:
    serving = limited(Limits(stages={"a": Limit(tokens=30)}))
    flights = [begin(serving, ask(serving)) for _ in range(2)]
    with pytest.raises(
        BudgetExceeded, match=r"0 tokens spent, 24 tokens promised to 2 calls under way.*need 12"
    ) as no:
        begin(serving, ask(serving))
    assert (no.value.scope, no.value.name, no.value.figure, no.value.retry_after_s) == ("stage", "a", "tokens", None)
    begin(serving, ask(serving, "b")).finish()
    flights[0].saw(Usage(2, 2, 1))
    flights[0].finish()  # took 3 instead of 12: now there is room
    begin(serving, ask(serving)).finish("failed")
    flights[1].finish("failed")
    (state,) = serving.statistics().limits
    assert (state.spent.tokens, state.promised, state.refused) == (3, NOTHING, 1)


def test_a_refused_call_leaves_a_record_and_was_never_queued() -> None:
    serving = limited(Limits(tenants={"acme": Limit(calls=0)}))
    with pytest.raises(BudgetExceeded, match=r"tenant 'acme' may use 0 calls \(limits.tenants.acme.calls\): 0 calls"):
        begin(serving, ask(serving, tenant="acme"))
    (record,) = serving.records.records()
    assert (record.error or "").startswith("BudgetExceeded: tenant 'acme'") and record.attempts == 0
    assert record.backend is None and is_quiet(serving)
    begin(serving, ask(serving, tenant="other")).finish()
    begin(serving, ask(serving)).finish()


def test_each_run_stage_and_tenant_has_its_own_sums_under_a_star() -> None:
    serving = limited(Limits(Limit(calls=2), {"*": Limit(calls=3), "a": Limit()}, {"*": Limit(calls=1)}))
    for run in ("r", "s"):
        serving.progress.run_started(run, thread=None)
    use(serving, run="r", tenant="t")
    use(serving, run="r", stage="b", tenant="u")
    with pytest.raises(BudgetExceeded, match="run 'r' may use 2 calls"):
        use(serving, run="r")
    with pytest.raises(BudgetExceeded, match="tenant 't' may use 1 calls"):
        use(serving, run="s", tenant="t")
    use(serving, run="s", stage="x|b")
    use(serving, stage="b")
    use(serving, stage="b")
    with pytest.raises(BudgetExceeded, match="stage 'b' may use 3 calls"):
        use(serving, stage="b")
    use(serving, stage="x|b")
    assert [each.name for each in serving.statistics().limits if each.scope == "run"] == ["r", "s"]
    serving.progress.run_ended("r", Outcome.DONE)
    assert [each.name for each in serving.statistics().limits if each.scope == "run"] == ["s"]


def test_money_counts_by_the_backends_prices() -> None:
    serving = limited(Limits(stages={"a": Limit(cost_usd=24.0)}))
    use(serving, 12)
    with pytest.raises(BudgetExceeded, match=r"\$24 .*\$12 spent, this call is expected to need \$13"):
        use(serving, max_tokens=11)
    use(serving, 12)
    free = a_serving()
    free.limits.shared = Limits(stages={"a": Limit(cost_usd=0)})
    use(free)


def test_a_mappings_bound_on_the_answer_counts_too() -> None:
    serving = limited(Limits(stages={"a": Limit(tokens=100)}))
    with pytest.raises(BudgetExceeded, match="need 258 tokens; bound its answer by max_tokens"):
        use(serving, max_tokens=None)


def test_ten_dimes_are_a_dollar() -> None:
    account = UsageAccount()
    for _ in range(10):
        account.promise(Amount(1, 0, 0.1))
    assert account.total.cost_usd == 1.0
    for _ in range(10):
        account.settle(Amount(1, 0, 0.1), NOTHING, 0.0)
    account.check_integrity()


# Windows


def test_a_window_slides_and_its_memory_is_bounded() -> None:
    clock = HandClock()
    serving = limited(Limits(tenants={"t": Limit(calls=6, per_s=60)}), clock)
    for _ in range(6):
        use(serving, tenant="t")
        clock.now += 5
    with pytest.raises(BudgetExceeded, match=r"6 calls in any 60 s .*there is room in 31\.0 s") as no:
        use(serving, tenant="t")
    assert no.value.retry_after_s == pytest.approx(31.0)
    clock.now += 31
    use(serving, tenant="t")
    with pytest.raises(BudgetExceeded, match=r"room in 5\.0 s"):
        use(serving, tenant="t")
    account = UsageAccount()
    for n in range(10_000):
        account.look(60, n * 0.1)
        account.promise(Amount(1))
        account.settle(Amount(1), Amount(1), n * 0.1)
    assert len(account.slices) <= SLICES + 2 and 600 <= account.spent.calls <= 611


def test_another_window_begins_empty_and_another_figure_does_not() -> None:
    serving = limited(Limits(stages={"a": Limit(calls=2)}))
    use(serving)
    serving.limits.shared = Limits(stages={"a": Limit(calls=1)})
    with pytest.raises(BudgetExceeded, match="1 calls spent; raise the limit, or give it a window"):
        use(serving)
    serving.limits.shared = Limits(stages={"a": Limit(calls=1, per_s=60)})
    use(serving)
    serving.limits.shared = NO_LIMITS
    assert serving.statistics().limits == []
    use(serving)


# Time


def test_a_runs_time_is_over_for_calls_that_come_and_for_those_that_wait() -> None:
    clock = HandClock()
    serving = limited(Limits(Limit(wall_s=30)), clock, max_concurrency=1)
    serving.progress.run_started("r", thread=None)
    holder = begin(serving, ask(serving))
    clock.now += 10
    waiting = serve(ask(serving, run="r", deadline_s=25.0), Sender())
    assert (wait := step(waiting)).timeout_s == 20
    clock.now += 20
    with pytest.raises(BudgetExceeded, match=r"run 'r' may use 30 s .*began 30\.000 s ago, and this call waited 20"):
        step(waiting, TimeoutError())
    assert not wait.turn.settled
    with pytest.raises(BudgetExceeded, match=r"began 30\.000 s ago; raise the limit, or begin a new run"):
        step(serve(ask(serving, run="r"), Sender()))
    holder.finish()
    assert is_quiet(serving)


def test_an_earlier_deadline_stays_a_deadline() -> None:
    serving = limited(Limits(Limit(wall_s=30)), max_concurrency=1)
    serving.progress.run_started("r", thread=None)
    holder = begin(serving, ask(serving))
    waiting = serve(ask(serving, run="r", deadline_s=5.0), Sender())
    assert step(waiting).timeout_s == 5
    with pytest.raises(DeadlineExceeded):
        step(waiting, TimeoutError())
    holder.finish()


def test_a_stages_time_is_what_engines_worked() -> None:
    clock = HandClock()
    serving = limited(Limits(stages={"a": Limit(wall_s=5)}), clock)
    serving.progress.run_started("r", thread=None)
    inflight = begin(serving, ask(serving, run="r"))
    clock.now += 4
    inflight.saw(Usage(2, 0, 5))
    inflight.finish()
    with pytest.raises(BudgetExceeded, match=r"5 s .*4 s spent, this call is expected to need 4 s"):
        use(serving, run="r")
    serving.limits.shared = Limits(stages={"a": Limit(wall_s=8)})
    use(serving, run="r")


# On the way


def test_a_retry_keeps_what_it_was_promised_and_counts_once() -> None:
    serving = limited(Limits(stages={"a": Limit(calls=1)}))
    steps = serve(ask(serving), Sender(AttemptFailed(RuntimeError("busy")), "stream"))
    assert isinstance(step(steps), Sleep)
    assert promised(serving) == [("stage", "a", Amount(1, 12, 12.0, 1e-6))]
    (inflight,) = step(steps)
    inflight.finish()
    (state,) = serving.statistics().limits
    assert (state.spent.calls, state.promised) == (1, NOTHING)


def test_a_retry_goes_by_the_limits_of_its_moment() -> None:
    serving = limited(Limits(stages={"a": Limit(calls=1)}))
    steps = serve(ask(serving), Sender(AttemptFailed(RuntimeError("busy")), "stream"))
    step(steps)
    serving.limits.shared = Limits(stages={"a": Limit(calls=0)})
    with pytest.raises(BudgetExceeded):
        step(steps)
    assert promised(serving) == [] and is_quiet(serving)


def test_layers_hold_side_by_side_and_a_runs_own_goes_with_it() -> None:
    serving = limited(Limits(Limit(calls=3)))
    graph = LimitScope(Limits(stages={"a": Limit(calls=2)}), object(), " of graph 'g'")
    own = LimitScope(
        Limits(Limit(calls=9), {"b": Limit(calls=1)}), CONFIGURABLE, " in the run's configurable", of_run=True
    )
    for run in ("r", "s"):
        serving.progress.run_started(run, thread=None)
    use(serving, run="r", layers=(graph, own))
    use(serving, run="r", layers=(graph,))
    with pytest.raises(BudgetExceeded, match=r"\(limits.stages.a.calls of graph 'g'\)"):
        use(serving, run="s", layers=(graph,))
    use(serving, run="s", stage="b", layers=(own,))
    with pytest.raises(BudgetExceeded, match=r"\(limits.stages.b.calls in the run's configurable\)"):
        use(serving, run="s", stage="b", layers=(own,))
    use(serving, run="r", stage="b", layers=(own,))
    with pytest.raises(BudgetExceeded, match=r"run 'r' may use 3 calls \(limits.run.calls\)"):
        use(serving, run="r", stage="c")


def test_who_was_not_seen_longest_is_forgotten_but_not_while_a_call_is_under_way() -> None:
    clock, calls = HandClock(), {name: a_call(tenant=name) for name in "tuv"}
    book = LimitBook(Limits(tenants={"*": Limit(calls=1)}), clock, keep=2)
    held = book.promise(calls["t"], (), None, Amount(1))
    for name in "uv":
        book.settle(book.promise(calls[name], (), None, Amount(1)), Amount(1))
    assert {each.name for each in book.statistics()} == {"t", "v"}
    with pytest.raises(BudgetExceeded):
        book.promise(calls["t"], (), None, Amount(1))
    book.settle(held, NOTHING)
    book.settle(held, Amount(7))
    assert {each.name: each.spent.calls for each in book.statistics()} == {"t": 0, "v": 1}


def test_from_many_threads_no_more_get_in_than_may() -> None:
    serving = limited(Limits(stages={"a": Limit(tokens=12 * 40)}), max_concurrency=3)
    let_in: list[int] = []
    every = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)

    def work(_: int) -> None:
        try:
            drive(serve(ask(serving), Sender()))
            let_in.append(1)
        except BudgetExceeded:
            pass

    try:
        with ThreadPoolExecutor(16) as pool:
            list(pool.map(work, range(200)))
    finally:
        sys.setswitchinterval(every)
    assert len(let_in) == 40 and is_quiet(serving) and promised(serving) == []


def test_without_limits_nothing_is_kept_and_it_costs_nothing() -> None:
    serving = a_serving()
    inflight = ask(serving, tenant="t")
    began = time.thread_time()
    for _ in range(10_000):
        assert not (inflight.layers or serving.limits.concern_all)
    assert (time.thread_time() - began) / 10_000 < 5e-6
    use(serving, tenant="t")
    assert serving.limits.statistics() == [] and not serving.limits._accounts


# What may be said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"calls": -1}, "calls must be a whole number of at least 0, got -1"),
        ({"calls": 1.5}, "calls must be a whole number"),
        ({"tokens": True}, "tokens must be a whole number of at least 0, got True"),
        ({"cost_usd": "1"}, "cost_usd must be a number of at least 0, got '1'"),
        ({"wall_s": math.nan}, "wall_s must be a number of at least 0, got nan"),
        ({"calls": 1, "per_s": 0}, "per_s must be a number of seconds above 0, got 0"),
        ({"per_s": 60}, "per_s limits nothing by itself; give one of calls, tokens, cost_usd, wall_s with it"),
    ],
)
def test_a_limit_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limit(**given)
    with pytest.raises(ConfigError, match=rf"^limits\.tenants\.acme\.{message}"):
        Limits.of({"tenants": {"acme": given}})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"runs": {}}, "limits.runs: unknown key; did you mean 'run'"),
        ({"run": {"cals": 1}}, "limits.run.cals: unknown key; did you mean 'calls'"),
        ({"run": 5}, "limits.run: expected a table, got 5"),
        ({"stages": {"a": 5}}, "limits.stages.a: expected a table, got 5"),
        ({"stages": [1]}, r"limits.stages: expected a table, got \[1\]"),
        ({"run": {"wall_s": 5, "per_s": 60}}, "limits.run: wall_s counts from the run's beginning"),
        (7, "limits: expected a table, got 7"),
    ],
)
def test_limits_that_cannot_be(given: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^{message}"):
        Limits.of(given)


def test_limits_in_code_and_as_a_table_are_the_same() -> None:
    made = Limits(Limit(calls=5), tenants={"t": Limit(tokens=9, per_s=60)})
    assert Limits.of({"run": {"calls": 5}, "tenants": {"t": {"tokens": 9, "per_s": 60}}}) == made
    assert Limits.of(made) is made and Limits.of({"run": Limit(calls=5)}).run == Limit(calls=5)
    with pytest.raises(ConfigError, match=r"limits\.stages\.a: expected a Limit, got 5"):
        Limits(stages={"a": 5})  # type: ignore[dict-item]
    with pytest.raises(ConfigError, match=r"limits: expected Limits, got .*Limits\.of"):
        a_serving().limits.shared = {"run": {"calls": 5}}  # type: ignore[assignment]
