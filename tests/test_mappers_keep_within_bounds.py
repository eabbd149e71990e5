"""No mapper, in whatever state, sends a call where the validation forbids it, or fails where somebody could."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.call import Ask, Assignment
from orla_lg.core.engine.backend import Capability, Cost, Probe, Support
from orla_lg.core.engine.breaker import Circuit
from orla_lg.core.engine.capabilities import EngineStats
from orla_lg.core.engine.speed import Speed
from orla_lg.core.mapping import Consultation, Mapper, assign
from orla_lg.core.placement.candidates import SettledCandidates
from orla_lg.core.placement.view import BackendView, find, unfit
from orla_lg.core.record import Record
from orla_lg.core.steps import drive
from orla_lg.errors import BackendUnavailable, MappingError
from orla_lg.mappers import (
    CostQualityMapper,
    ExplicitMapper,
    First,
    LearnedMapper,
    LoadAware,
    NeedMapper,
    OneBitStageMapper,
    StageTable,
)
from orla_lg.mappers.features import DENSE
from orla_lg.mappers.http import Misanswered, _read
from orla_lg.mappers.learned import Model
from tests.core.fakes import HandBackground, HandClock, a_call, a_view

NAMES = ("light", "heavy", "spare")
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}

probes = st.none() | st.builds(
    Probe,
    models=st.sampled_from([(), ("m",), ("m", "n")]),
    capabilities=st.dictionaries(
        st.sampled_from([Capability.JSON_SCHEMA, Capability.TOOLS]), st.sampled_from(list(Support))
    ),
    context_tokens=st.none() | st.integers(1, 200),
    request_tokens=st.none() | st.integers(1, 200),
    vision=st.none() | st.booleans(),
)
numbers = st.floats(0.1, 1e4)
states = st.fixed_dictionaries(
    {
        "probe": probes,
        "quality": st.none() | st.floats(0, 1),
        "cost": st.builds(Cost, numbers, numbers),
        "waiting": st.integers(0, 9),
        "in_flight": st.integers(0, 9),
        "max_concurrency": st.none() | st.integers(1, 4),
        "circuit": st.sampled_from(Circuit),
        "speed": st.builds(Speed, st.none() | numbers, st.none() | numbers, st.none() | numbers, st.none() | numbers),
        "load": st.none() | st.builds(EngineStats, running=st.integers(0, 9), waiting=st.integers(0, 9)),
        "resident_tokens": st.integers(0, 999),
    }
)
backends = st.tuples(states, states, states).map(
    lambda each: [a_view(name, **state) for name, state in zip(NAMES, each, strict=True)]
)
asks = st.builds(
    lambda chars, picture, **rest: Ask(
        "auto",
        [{"role": "user", "content": [{"type": "text", "text": "x" * chars}, *([PICTURE] if picture else [])]}],
        **rest,
    ),
    chars=st.integers(1, 3000),
    picture=st.booleans(),
    json_schema=st.booleans(),
    tools=st.booleans(),
    max_tokens=st.none() | st.integers(1, 300),
)
orders = st.permutations(NAMES).flatmap(lambda names: st.integers(1, 3).map(lambda count: names[:count]))
explicit = orders.map(lambda names: ExplicitMapper({"node": list(names)}))
schema = {"to": ["light", "heavy"], "response_format": {"type": "json_schema"}, "max_tokens": 90}
ALWAYS_COMPLEX, ALWAYS_SIMPLE = (Model(weight, (0.0,) * len(DENSE), 0.5) for weight in (9.0, -9.0))

simple_mappers = st.one_of(
    explicit,
    st.just(ExplicitMapper({"*": schema})),
    st.sampled_from(["first", "cheapest", "best", "least_loaded"]).map(lambda prefer: NeedMapper([], prefer)),
    st.sampled_from([ALWAYS_COMPLEX, ALWAYS_SIMPLE]).map(LearnedMapper),
    st.just(OneBitStageMapper("light", "heavy", judge="spare")),
    st.builds(CostQualityMapper, target=st.floats(0, 1), default=st.sampled_from(["strict", "prefer"]),
              budget_usd=st.none() | st.just(0.0), seed=st.just(1)),
)  # fmt: skip
mappers = st.recursive(
    simple_mappers,
    lambda inner: st.one_of(
        inner.map(lambda mapper: LoadAware(mapper, 1.0)),
        st.tuples(inner, inner).map(lambda two: First(*two)),
        inner.map(lambda mapper: StageTable({"node": mapper})),
    ),
    max_leaves=3,
)


def asking(answer: str | Exception) -> Consultation:
    def model(*_: Any) -> Any:
        yield from ()
        if isinstance(answer, Exception):
            raise answer
        return answer

    return Consultation(HandBackground(HandClock()), model)  # type: ignore[arg-type]


def placed(mapper: Mapper, ask: Ask, views: list[BackendView], judge: str | Exception = "0") -> Assignment:
    call = a_call(stage="node")
    call.ask = ask
    chosen = drive(assign(call, (mapper,), SettledCandidates(views), asking(judge)))
    assert isinstance(chosen, Assignment)
    return chosen


@given(mappers, asks, backends, st.sampled_from(["0", "1", "simple", "complex", "?", BackendUnavailable("gone")]))
def test_whoever_decides_the_backend_and_its_alternatives_can(
    mapper: Mapper, ask: Ask, views: list[BackendView], judge: str | Exception
) -> None:
    try:
        chosen = placed(mapper, ask, views, judge)
    except MappingError:
        return
    for name in (chosen.backend, *chosen.alternatives):
        view = find(views, name)
        assert view is not None and unfit(ask.given(chosen.parameters), view, chosen.model) == []
    assert chosen.backend not in chosen.alternatives


@given(orders, asks, backends, st.booleans())
def test_an_error_means_that_none_of_those_allowed_can(
    names: tuple[str, ...], ask: Ask, views: list[BackendView], moves: bool
) -> None:
    mapper = ExplicitMapper({"node": list(names)})
    able = [name for name in names if unfit(ask, next(v for v in views if v.name == name), None) == []]
    if not able:
        with pytest.raises(MappingError, match="Backends that can"):
            placed(mapper, ask, views)
    elif moves:
        assert placed(LoadAware(mapper), ask, views).backend in able
    else:
        chosen = placed(mapper, ask, views)
        assert [chosen.backend, *chosen.alternatives] == able, "in the order that the mapping gives"
        assert ("cannot" in chosen.reason) is (able[0] != names[0])


@given(asks, backends, st.lists(st.tuples(st.sampled_from(NAMES), st.floats(0, 1)), max_size=30), st.integers())
def test_whatever_a_bandit_was_told_it_stays_with_those_that_can(
    ask: Ask, views: list[BackendView], scores: list[tuple[str, float]], seed: int
) -> None:
    mapper = CostQualityMapper(0.7, seed=seed)
    blank = Record(**dict.fromkeys(Record.__slots__) | {"id": "r", "stage": "node", "considered": ()})
    for name, score in scores:
        mapper.feedback(replace(blank, backend=name), score)
    able = [view.name for view in views if unfit(ask, view, None) == []]
    try:
        chosen = placed(mapper, ask, views)
    except MappingError:
        assert not able
    else:
        assert {chosen.backend, *chosen.alternatives} <= set(able)


answers = st.recursive(
    st.none() | st.booleans() | st.integers() | st.sampled_from([*NAMES, "nobody"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["backend", "alternatives", "reason"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(answers, asks, backends)
def test_whatever_a_service_answers(answer: Any, ask: Ask, views: list[BackendView]) -> None:
    call = a_call(stage="node")
    call.ask = ask
    try:
        chosen = _read(json.loads(json.dumps(answer)), call, views)
    except Misanswered:
        return
    if chosen is not None:
        assert unfit(ask, next(view for view in views if view.name == chosen.backend), None) == []
        through = ExplicitMapper({"node": [chosen.backend, *chosen.alternatives]})
        assert placed(through, ask, views).backend == chosen.backend


def test_the_first_that_can_steps_in_and_the_record_says_why() -> None:
    blind = a_view("light", probe=Probe(vision=False, capabilities={Capability.TOOLS: Support.UNSUPPORTED}))
    views = [blind, a_view("heavy", probe=Probe(vision=True))]
    ask = Ask("auto", [{"role": "user", "content": [PICTURE]}], tools=True)
    chosen = placed(ExplicitMapper({"*": ["light", "heavy"]}), ask, views)
    assert (chosen.backend, chosen.alternatives) == ("heavy", ())
    assert chosen.reason == (
        "mapping['*']; 'light' cannot: the engine cannot call tools; the model cannot see images"
    )
    with pytest.raises(MappingError, match=r"'light': .*cannot see images\. Backends that can: heavy"):
        placed(ExplicitMapper({"*": "light"}), ask, views)


def test_an_answer_that_cannot_fit_beside_its_prompt_is_refused_only_where_the_engine_would() -> None:
    ask = Ask("auto", [{"role": "user", "content": "x" * 240}], max_tokens=81)
    strict, lenient = Probe(context_tokens=100, request_tokens=100), Probe(context_tokens=100)
    assert unfit(ask, a_view("b", probe=lenient), None) == []
    assert unfit(replace(ask, max_tokens=80), a_view("b", probe=strict), None) == []
    (fault,) = unfit(ask, a_view("b", probe=strict), None)
    assert "at least 20 tokens" in fault and "max_tokens is 81" in fault and "holds 100 for both" in fault
    silent = replace(ask, max_tokens=None)
    for name in ("max_tokens", "max_completion_tokens"):  # the mapping's bound, under either of its names
        assert unfit(silent.given({name: 81}), a_view("b", probe=strict), None) != []
        assert unfit(silent.given({name: 80}), a_view("b", probe=strict), None) == []
