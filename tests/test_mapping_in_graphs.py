"""Mappings in wrapped graphs, on the wire: what the engine was sent, and what the record says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import (
    Assignment,
    BackendView,
    Call,
    ChatOrla,
    Cost,
    Hints,
    MappingError,
    Orla,
    OrlaError,
    Planned,
    RecordUnknown,
)
from orla_lg.graph.plan import BY_CODE
from orla_lg.mappers import CostQualityMapper, ExplicitMapper, First, HttpMapper, LoadAware, OneBitStageMapper
from tests.conftest import CALLER_KEY, at, chat
from tests.stub_engine import Gate, Reply, Seen, StubEngine

HI: Any = {"messages": [("user", "hi")]}
MESSAGES: Any = [{"role": "user", "content": "hi"}]
MakeOrla = Callable[..., Orla]


def graph_of(llm: Any, *stages: str, **metadata: Any) -> Any:
    """A chain of nodes that each call the model, whichever way the graph is invoked."""
    builder = StateGraph(MessagesState)
    for name in stages:

        def node(state: MessagesState) -> dict[str, Any]:
            return {"messages": [llm.invoke(state["messages"])]}

        builder.add_node(name, node, metadata=metadata or None)
    for before, after in zip((START, *stages), stages, strict=False):
        builder.add_edge(before, after)
    return builder


def variant(name: str) -> Any:
    return {"configurable": {"orla": {"variant": name}}}


def two(make_orla: MakeOrla, engine: StubEngine, **settings: Any) -> Orla:
    settings = {"mapper": {"*": "main"}, **settings}
    return make_orla(at(engine, "main", cost=Cost(1, 1), quality=0.9), at(engine, "light", quality=0.5), **settings)


# The plan


class OnlyDrafts:
    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        return Assignment("main") if call.identity.stage == "draft" else None

    def foretell(self, stage: str) -> Planned | None:
        return Planned(stage, ("main",), "my table") if stage == "draft" else None


def test_where_each_stage_goes_shows_without_a_call(engine: StubEngine, make_orla: MakeOrla) -> None:
    deciding = CostQualityMapper(default="strict")
    orla = two(make_orla, engine, mapper={"reply": ["light", "main"], "judge": deciding})
    builder = graph_of(chat(engine), "draft", "reply", "judge")
    shared = [("draft", (), BY_CODE), ("reply", ("light", "main"), "mapping['reply']"),
              ("judge", (), "mapping['judge']: CostQualityMapper, at each call")]  # fmt: skip
    assert [(each.stage, each.backends, each.by) for each in orla.plan(builder)] == shared
    own = LoadAware(First(ExplicitMapper({"draft": "light"}), ExplicitMapper({"reply": "light"})))
    wrapped = orla.wrap(builder, mapper=own)
    expected = [
        ("draft", ("light",), "mapping['draft'], by load"),
        ("reply", ("light",), "mapping['reply'], by load"),
    ]
    assert [(each.stage, each.backends, each.by) for each in orla.plan(wrapped)] == [*expected, shared[2]]
    assert [each.backends for each in orla.plan(wrapped, mapper={"*": "main"})] == [("main",)] * 3
    asking = First(HttpMapper("http://127.0.0.1:1/map"), OneBitStageMapper("light", "main"))
    said = {(each.backends, each.by) for each in orla.plan(builder, mapper=asking)}
    assert said == {(("light", "main"), "HttpMapper, at each call; else OneBitStageMapper, at each call")}
    foreknown = {(each.backends, each.by) for each in orla.plan(builder, mapper=LoadAware(OnlyDrafts()))}
    assert foreknown == {(("main",), "my table, by load"), (("light", "main"), "mapping['reply']"), shared[2][1:]}
    with pytest.raises(OrlaError, match="expected a StateGraph or a compiled LangGraph graph, got str"):
        orla.plan("x")
    graph = orla.wrap(builder)
    graph.invoke(HI)
    went = [record.backend for record in orla.records()]
    assert went == ["main", "light", "main"], "the draft's code names a model of main"


def test_all_that_cannot_be_is_told_at_once(
    engine: StubEngine, make_orla: MakeOrla, caplog: pytest.LogCaptureFixture
) -> None:
    orla = make_orla(at(engine, "main", model="gone"), at(engine, "light"), mapper={"*": "light"})
    orla.variant("cheap", {"reply_": "light"})
    table = {"draft": ["main", "light"], "replay": "light", "reply": {"needs": ["flush_workflow", "context>900k"]}}
    with pytest.raises(MappingError) as raised:
        mapper = First(table, CostQualityMapper(stages={"drafft": "strict"}))
        orla.wrap(graph_of(chat(engine), "draft", "reply"), mapper=mapper)
    head, *faults = str(raised.value).splitlines()
    assert "cannot be served as mapped" in head and len(faults) == 4
    assert "stage 'drafft', which the graph does not have" in faults[1]
    assert "stage 'replay', which the graph does not have; did you mean 'reply'" in faults[0]
    assert "stage 'draft' on backend 'main': model 'gone' is not served there" in faults[2]
    assert "stage 'reply': no backend meets its needs: 'main' lacks flush_workflow, context>900k" in faults[3]
    assert "variant 'cheap' of the mapping names stage 'reply_', which no graph wrapped so far has" in caplog.text


# Variants


def test_a_variant_overrides_for_its_runs_only_and_only_what_it_names(
    engine: StubEngine, make_orla: MakeOrla
) -> None:
    orla = two(make_orla, engine)
    orla.variant("cheap", {"draft": "light"})
    graph = orla.wrap(graph_of(chat(engine), "draft", "reply"))
    graph.invoke(HI, variant("cheap"))
    graph.invoke(HI)
    asyncio.run(graph.ainvoke(HI, variant("cheap")))
    found = [(r.stage, r.backend, r.variant) for r in orla.records()]
    one = [("draft", "light", "cheap"), ("reply", "main", "cheap")]
    assert found == [*one, ("draft", "main", None), ("reply", "main", None), *one]


def test_a_variant_is_stronger_than_the_graphs_own_mapper(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, mapper=None)
    orla.variant("cheap", {"*": "light"})
    graph = orla.wrap(graph_of(chat(engine), "ask"), mapper={"ask": "main"})
    graph.invoke(HI, variant("cheap"))
    assert orla.records()[-1].backend == "light"
    orla.variant("cheap", {"*": "main"})
    graph.invoke(HI, variant("cheap"))
    assert orla.records()[-1].backend == "main", "the same name again replaces it"


def test_variants_are_checked_when_named_and_when_chosen(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    with pytest.raises(MappingError, match=r"variant 'cheap': .*'lihgt'.*did you mean 'light'"):
        orla.variant("cheap", {"*": "lihgt"})
    orla.variant("cheap", {"*": "light"})
    graph = orla.wrap(graph_of(chat(engine), "ask"))
    with pytest.raises(MappingError, match="variant 'chep' does not exist; did you mean 'cheap'"):
        graph.invoke(HI, variant("chep"))
    for wrong in (3, ""):
        with pytest.raises(ValueError, match="variant must be a name"):
            Hints(variant=wrong)  # type: ignore[arg-type]
    assert not engine.chats


def test_a_drop_in_model_takes_a_variant_too(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    orla.variant("cheap", {"ask": "light"})
    orla.wrap(graph_of(ChatOrla(orla=orla, model="main"), "ask")).invoke(HI, variant("cheap"))
    assert [(r.backend, r.variant) for r in orla.records()] == [("light", "cheap")]


# Parameters

SET = {"to": "main", "temperature": 0.25, "max_tokens": 50, "seed": 7, "extra_body": {"min_p": 0.1}}


def sent(engine: StubEngine, make_orla: MakeOrla, mapping: Any, /, **given: Any) -> dict[str, Any]:
    """What the engine is sent for a call with *given* from a node whose mapping is *mapping*."""
    orla = make_orla(at(engine), mapper={"ask": mapping})
    client = openai.OpenAI(base_url=engine.url, api_key=CALLER_KEY)

    def node(state: MessagesState) -> dict[str, Any]:
        client.chat.completions.create(model="x", messages=MESSAGES, **given)
        return {}

    orla.wrap(StateGraph(MessagesState).add_node("ask", node).add_edge(START, "ask")).invoke(HI)
    return engine.chats[-1].body


def test_parameters_are_set_where_the_caller_says_nothing(engine: StubEngine, make_orla: MakeOrla) -> None:
    body = sent(engine, make_orla, SET)
    assert (body["temperature"], body["max_tokens"], body["seed"], body["min_p"]) == (0.25, 50, 7, 0.1)
    assert "to" not in body and "extra_body" not in body


def test_what_the_caller_gives_is_never_changed(engine: StubEngine, make_orla: MakeOrla) -> None:
    body = sent(engine, make_orla, SET, temperature=0.9, seed=1, extra_body={"min_p": 0.5})
    assert (body["temperature"], body["seed"], body["min_p"], body["max_tokens"]) == (0.9, 1, 0.5, 50)


@pytest.mark.parametrize("set_as", ["max_tokens", "max_completion_tokens"])
@pytest.mark.parametrize("given_as", ["max_tokens", "max_completion_tokens"])
def test_a_bound_is_given_under_one_of_its_names_only(
    engine: StubEngine, make_orla: MakeOrla, set_as: str, given_as: str
) -> None:
    body = sent(engine, make_orla, {"to": "main", set_as: 50}, **{given_as: 9})
    assert {name: body[name] for name in body if name.startswith("max_")} == {given_as: 9}


def test_parameters_reach_chat_models_and_variants_have_their_own(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, mapper={"ask": {"to": "main", "temperature": 0.25}})
    orla.variant("hot", {"ask": {"to": "main", "temperature": 1.5}})
    for llm in (chat(engine), ChatOrla(orla=orla, model="main")):
        graph = orla.wrap(graph_of(llm, "ask"))
        for config in (None, variant("hot")):
            graph.invoke(HI, config)
    orla.wrap(graph_of(chat(engine, temperature=0.9), "ask")).invoke(HI)
    assert [seen.body["temperature"] for seen in engine.chats] == [0.25, 1.5, 0.25, 1.5, 0.9]


# One bit


def judging(seen: Seen) -> Reply | None:
    judged = "response_format" in seen.body
    return Reply(text="1" if "hard" in seen.last else "0") if judged else None


def test_one_bit_in_a_graph_from_threads_and_loops(engine: StubEngine, make_orla: MakeOrla) -> None:
    engine.rule = judging
    orla = two(make_orla, engine, mapper={"ask": OneBitStageMapper("light", "main"), "*": "main"})
    graph = orla.wrap(graph_of(chat(engine), "ask"))
    texts = [f"{kind} question {n}" for n in range(4) for kind in ("hard", "easy")] * 2

    def asked(text: str) -> Any:
        return {"messages": [("user", text)]}

    async def many() -> None:
        async with asyncio.TaskGroup() as group:
            for text in texts:
                group.create_task(graph.ainvoke(asked(text)))

    with ThreadPoolExecutor(8) as pool:
        for each in [pool.submit(asyncio.run, many()), *(pool.submit(graph.invoke, asked(t)) for t in texts)]:
            each.result(30)
    own = [record for record in orla.records() if record.stage == "one_bit"]
    assert len(own) == 8, "one for each text, however many bring it at once"
    assert {(r.backend, r.error) for r in own} == {("light", None)}
    assert all(r.run is not None and r.prompt_tokens for r in own)
    real = [record for record in orla.records() if record.stage == "ask"]
    assert sorted(r.backend or "" for r in real) == ["light"] * 16 + ["main"] * 16
    assert orla.statistics().costs.stages["one_bit"].calls == 8


def test_the_judge_waits_its_turn_like_any_other(engine: StubEngine, make_orla: MakeOrla) -> None:
    gate = Gate()
    engine.rule = judging
    orla = make_orla(at(engine, "main"), at(engine, "light", max_concurrency=1),
                     mapper={"ask": OneBitStageMapper("light", "main"), "*": "light"})  # fmt: skip
    engine.script.append(Reply(gate=gate))
    busy, ask = orla.wrap(graph_of(chat(engine), "busy")), orla.wrap(graph_of(chat(engine), "ask"))
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(busy.invoke, HI)
        engine.wait(lambda e: e.in_flight == 1)
        second = pool.submit(ask.invoke, {"messages": [("user", "hard")]})
        while orla.statistics().backends["light"].queue.waiting == 0:
            time.sleep(0.001)
        gate.open()
        first.result(20)
        second.result(20)
    (own,) = [record for record in orla.records() if record.stage == "one_bit"]
    assert own.queue_wait_s > 0 and orla.records()[-1].backend == "main"


# Load and learning


def test_a_saturated_backend_is_left_for_an_alternative(engine: StubEngine, make_orla: MakeOrla) -> None:
    gate = Gate()
    orla = make_orla(at(engine, "main", max_concurrency=1), at(engine, "light"),
                     mapper=LoadAware(ExplicitMapper({"*": ["main", "light"]})))  # fmt: skip
    graph = orla.wrap(graph_of(chat(engine), "ask"))
    engine.script.append(Reply(gate=gate))
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(graph.invoke, HI)
        engine.wait(lambda e: e.in_flight == 1)
        graph.invoke(HI)
        gate.open()
        first.result(20)
    moved, stayed = orla.records()
    assert (moved.backend, moved.mapper, stayed.backend, stayed.mapper) == (
        "light",
        "load+explicit",
        "main",
        "explicit",
    )
    assert {each.backend for each in moved.considered} == {"main", "light"}


def test_feedback_by_record_id_moves_a_stage(engine: StubEngine, make_orla: MakeOrla) -> None:
    mapper = CostQualityMapper(0.8, default="strict")
    orla = two(make_orla, engine, mapper={"*": mapper})
    graph = orla.wrap(graph_of(chat(engine), "ask"))
    graph.invoke(HI)
    assert orla.records()[-1].backend == "main"
    orla.variant("light", {"*": "light"})
    for _ in range(30):
        graph.invoke(HI, variant("light"))
        orla.feedback(orla.records()[-1].id, 1)
    graph.invoke(HI)
    assert (orla.records()[-1].backend, orla.records()[-1].mapper) == ("light", "cost_quality")
    for wrong in (-0.1, 1.1, True, "good", float("nan")):
        with pytest.raises(ValueError, match=r"a score must be a number in \[0, 1\]"):
            orla.feedback(orla.records()[-1].id, wrong)  # type: ignore[arg-type]
    with pytest.raises(RecordUnknown, match="no record 'gone'"):
        orla.feedback("gone", 1.0)


def test_feedback_on_a_record_that_is_no_longer_kept(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, keep_records=1)
    graph = orla.wrap(graph_of(chat(engine), "ask"))
    graph.invoke(HI)
    (first,) = orla.records()
    graph.invoke(HI)
    with pytest.raises(RecordUnknown, match="the newest 1 are kept, 1 older ones are gone"):
        orla.feedback(first.id, 1.0)


def test_a_mapper_given_to_wrap_learns_too_and_its_names_are_checked(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine)
    mapper = CostQualityMapper(0.8, default="strict")
    graph = orla.wrap(graph_of(chat(engine), "ask"), mapper=mapper)
    graph.invoke(HI)
    for _ in range(9):
        orla.feedback(orla.records()[-1].id, 0.0)
    graph.invoke(HI)
    assert orla.records()[-1].considered[0].numbers["quality"] == pytest.approx(9 / 19)
    with pytest.raises(MappingError, match="OneBitStageMapper names backend 'lihgt'"):
        orla.wrap(graph_of(chat(engine), "ask"), mapper=OneBitStageMapper("lihgt", "main"))
    with pytest.raises(MappingError, match="CostQualityMapper names backend 'x'"):
        two(make_orla, engine, mapper=CostQualityMapper(among=["x"]))
