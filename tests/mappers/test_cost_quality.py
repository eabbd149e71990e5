from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.accounting.learners import Learners
from orla_lg.core.engine.backend import Cost, Probe
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.lifecycle import serve
from orla_lg.errors import ConfigError, MappingError, RecordUnknown
from orla_lg.mappers import cost_quality
from orla_lg.mappers.cost_quality import Belief, CostQualityMapper
from orla_lg.mappers.table import StageTable
from tests.core.fakes import Sender, a_call, a_serving, a_view, decide, identity, new_call, step
from tests.core.test_record import a_record

CHEAP = a_view("cheap", cost=Cost(0.1, 0.1), quality=0.7)
MIDDLE = a_view("middle", cost=Cost(1.0, 1.0), quality=0.85)
DEAR = a_view("dear", cost=Cost(10.0, 10.0), quality=0.95)
VIEWS = [CHEAP, MIDDLE, DEAR]


def strict(target: float = 0.9, **rest: Any) -> CostQualityMapper:
    return CostQualityMapper(target, default="strict", **rest)


def record(stage: str = "node", backend: str | None = "cheap", **fields: Any) -> Any:
    blank = a_record("r")
    return type(blank)(**{name: getattr(blank, name) for name in blank.__slots__} | fields |
                       {"stage": stage, "backend": backend})  # fmt: skip


def score(mapper: CostQualityMapper, backend: str, *scores: float, stage: str = "node") -> None:
    for each in scores:
        mapper.feedback(record(stage, backend), each)


def to(mapper: CostQualityMapper, views: Sequence[Any] = VIEWS, **call: Any) -> str:
    return decide(mapper, a_call(**call), views).backend


@pytest.mark.parametrize(("target", "backend"), [(0.5, "cheap"), (0.8, "middle"), (0.95, "dear"), (0.99, "dear")])
def test_the_cheapest_that_reaches_the_target_else_the_best(target: float, backend: str) -> None:
    assert to(strict(target)) == backend


def test_feedback_moves_a_stage_and_no_other() -> None:
    mapper = strict(0.8)
    score(mapper, "cheap", *[1.0] * 10)
    assert to(mapper) == "cheap" and to(mapper, stage="other") == "middle"
    score(mapper, "cheap", *[0.0] * 10)
    assert to(mapper) == "middle"
    score(mapper, "middle", *[0.0] * 10)
    assert to(mapper) == "dear"
    assert mapper.quality("node", CHEAP) == pytest.approx((7 + 10) / 30)
    mapper.feedback(record(backend=None), 1.0)


SCORES = st.lists(st.tuples(st.sampled_from(["cheap", "middle", "dear"]), st.floats(0, 1)), max_size=60)


@given(scores=SCORES, target=st.floats(0, 1), seed=st.integers())
def test_a_strict_stage_is_never_explored(scores: list[tuple[str, float]], target: float, seed: int) -> None:
    """Whatever was learned, the choice is the rule's, and the same each time."""
    mapper = strict(target, seed=seed)
    for backend, said in scores:
        score(mapper, backend, said)
    believed = {}
    for view in VIEWS:
        said = [each for backend, each in scores if backend == view.name]
        believed[view.name] = Belief.of(view.quality, sum(said), sum(1 - each for each in said))
    good = [view for view in VIEWS if believed[view.name].mean >= target - 1e-9]
    best = max(VIEWS, key=lambda view: believed[view.name].mean)
    for _ in range(5):
        chosen = decide(mapper, a_call(), VIEWS)
        if good:
            assert chosen.backend == good[0].name, "VIEWS are in the order of their prices"
        else:
            assert believed[chosen.backend].mean == believed[best.name].mean
        assert not any("sampled" in each.numbers for each in chosen.considered)


def test_a_preferred_target_tries_the_cheap_now_and_then_and_ever_less_if_it_is_bad() -> None:
    mapper = CostQualityMapper(0.9, seed=1)
    early = sum(to(mapper) == "cheap" for _ in range(300))
    assert 3 <= early <= 60, "stated at 0.7, it may reach 0.9"
    score(mapper, "cheap", *[0.4] * 200)
    assert sum(to(mapper) == "cheap" for _ in range(300)) == 0
    score(mapper, "cheap", *[1.0] * 5000)
    assert sum(to(mapper) == "cheap" for _ in range(300)) == 300


def test_a_bandit_finds_the_backend_that_is_better_than_it_says() -> None:
    mapper = CostQualityMapper(0.8, seed=2)
    for _ in range(400):
        backend = to(mapper)
        mapper.feedback(record(backend=backend), {"cheap": 0.95, "middle": 0.7, "dear": 0.95}[backend])
    assert sum(to(mapper) == "cheap" for _ in range(100)) >= 90


def test_strictness_is_by_stage() -> None:
    mapper = CostQualityMapper(0.9, {"reply": "strict", "sub|draft": "strict", "draft": "prefer"}, "prefer")
    found = [mapper.strictness(stage) for stage in ("reply", "sub|reply", "sub|draft", "draft", "other")]
    assert found == ["strict", "strict", "strict", "prefer", "prefer"]


def test_a_run_that_spent_its_budget_gets_the_cheapest() -> None:
    mapper = strict(0.9, budget_usd=0.01)
    assert to(mapper) == "dear"
    mapper.note(record(workflow="w", run=None, cost_usd=0.009))
    assert to(mapper) == "middle", "what the dear one costs is more than is left"
    mapper.note(record(workflow="w", run=None, cost_usd=0.002))
    chosen = decide(mapper, a_call(), VIEWS)
    assert chosen.backend == "cheap" and "budget is spent" in chosen.reason
    assert to(mapper, workflow="another") == "dear"


def test_what_the_budget_ruled_out_is_told() -> None:
    mapper = CostQualityMapper(0.9, default="strict", budget_usd=0.001)
    views = [a_view("cheap", cost=Cost(1, 1), quality=0.5), a_view("dear", cost=Cost(100, 100), quality=0.95)]
    chosen = mapper.map(a_call(stage="node"), views)
    assert chosen.backend == "cheap"
    assert "none reaches it within the run's budget, which 1 would exceed, the best" in chosen.reason


def test_what_is_cached_and_how_long_answers_are_count_in_the_cost() -> None:
    cost = Cost(1.0, 1.0, cached_input_per_mtoken=0.0)
    here, there = a_view("here", cost=cost, resident_tokens=5000), a_view("there", cost=Cost(0.9, 0.9))
    mapper = strict(0.0)
    assert to(mapper, [here, there], chars=20_000) == "here"
    for _ in range(100):
        mapper.note(record(completion_tokens=200_000))
    chosen = decide(mapper, a_call(chars=20_000), [here, there])
    assert chosen.backend == "there" and chosen.considered[0].numbers["cost_usd"] == pytest.approx(0.2, rel=0.05)


def test_who_cannot_or_is_left_alone_is_not_chosen() -> None:
    small = a_view("cheap", probe=Probe(context_tokens=1), quality=1.0)
    dead = a_view("middle", circuit=Circuit.OPEN, quality=1.0)
    assert to(strict(0.5), [small, dead, DEAR], chars=999) == "dear"
    assert to(strict(0.5), [small, dead], chars=999) == "middle", "left alone, but there is no other"
    with pytest.raises(MappingError, match="'cheap': the prompt has at least 83 tokens"):
        to(strict(), [small], chars=999)
    with pytest.raises(MappingError, match="there is none"):
        to(strict(among=["gone"]))


def test_it_chooses_among_those_it_was_given_and_leaves_other_calls_alone() -> None:
    mapper = strict(0.5, among=["middle", "dear"])
    chosen = decide(mapper, a_call(), VIEWS)
    assert (chosen.backend, chosen.alternatives) == ("middle", ("dear",))
    assert mapper.check_backends(["dear", "middel"]) == [
        "CostQualityMapper names backend 'middle', which does not exist; did you mean 'middel'? known: dear, middel"
    ]
    assert decide(mapper, a_call(stage=""), VIEWS) is None


def test_what_was_weighed_is_told() -> None:
    considered = {each.backend: each for each in decide(CostQualityMapper(0.8, seed=3), a_call(), VIEWS).considered}
    assert set(considered["dear"].numbers) == {"cost_usd", "quality", "sampled"}
    assert considered["dear"].numbers["quality"] == 0.95
    assert [each.verdict for each in considered.values()].count("chosen") == 1


@pytest.mark.parametrize(
    "wrong", [{"target": 1.5}, {"budget_usd": -1}, {"default": "strikt"}, {"stages": {"a": "maybe"}}]
)
def test_settings_are_checked(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        CostQualityMapper(**wrong)


def test_a_stated_zero_or_one_is_taken_for_certain_until_a_score() -> None:
    sure = [a_view("never", quality=0.0), a_view("always", cost=Cost(1, 1), quality=1.0)]
    assert {to(CostQualityMapper(0.9, seed=n), sure) for n in range(20)} == {"always"}


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost_quality, "KEEP", 5)
    mapper = CostQualityMapper()
    for n in range(50):
        mapper.note(record(f"s{n}", run=f"r{n}", completion_tokens=1))
        score(mapper, "cheap", 1.0, stage=f"s{n}")
    assert len(mapper._scores) == len(mapper._answers) == len(mapper._spent) == 5


# Being told


def test_every_part_that_learns_is_told_wherever_it_sits() -> None:
    shared, graphs = strict(0.8), strict(0.8)
    serving = a_serving("cheap", "dear")
    serving.learners.enlist(StageTable({"node": shared}))
    serving.learners.enlist(graphs)
    serving.learners.enlist(graphs)
    call = new_call(serving, "cheap", identity("w", run=None))
    step(serve(call, Sender()))
    (ended,) = serving.records.records()
    serving.feedback(ended.id, 1.0)
    assert [m.quality("node", CHEAP) for m in (shared, graphs)] == [pytest.approx(8 / 11)] * 2
    assert [len(m._spent) for m in (shared, graphs)] == [1, 1]
    with pytest.raises(RecordUnknown, match="no record 'gone': the newest 1 are kept"):
        serving.feedback("gone", 1.0)


def test_a_mapper_that_fails_to_learn_disturbs_nobody(caplog: pytest.LogCaptureFixture) -> None:
    class Fails:
        __slots__ = ()

        def map(self, call: object, backends: object) -> None: ...

        def note(self, record: object) -> None:
            raise RuntimeError("no")

    learners, told = Learners(), strict()
    learners.enlist(Fails())
    learners.enlist(told)
    learners.note(record(cost_usd=1.0))
    assert "a mapper failed in note()" in caplog.text and len(told._spent) == 1


def test_a_mapper_of_a_graph_that_is_gone_is_forgotten() -> None:
    learners = Learners()
    for _ in range(10):
        learners.enlist(strict())
    learners.note(record())
    assert len(learners._known) == 1, "the last one goes when the next comes"
