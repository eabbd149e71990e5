"""The paper's API: its Figures 5 to 8 on two stub engines, and what a workflow does and refuses."""

from __future__ import annotations

import asyncio
import runpy
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.tools import InjectedToolCallId, tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.jsonplus import JsonPlusSerializer
from langgraph.graph import START, StateGraph
from langgraph.types import Command, interrupt
from pydantic import BaseModel

from orla_lg import Backend, Hints, MappingError, Orla, Stage, StageError, Upstream, Workflow, WorkflowError
from orla_lg.workflow.stage import Mode
from tests.conftest import at
from tests.stub_engine import MODEL, OK, Reply, Seen, StubEngine

EXAMPLE = Path(__file__).parents[1] / "examples" / "paper_workflow.py"
MakeOrla = Callable[..., Orla]
TICKET = {"ticket": "my lamp was charged 2 times"}


class Classification(BaseModel):
    category: Literal["billing", "technical", "general"]


@tool
def read_policy(category: str) -> str:
    """Read a policy."""
    return f"policy of {category}"


def say(text: str) -> Callable[[Upstream, Any], str]:
    return lambda upstream, given: text


def stages_of(workflow: Workflow) -> list[tuple[str, str]]:
    return [(record.stage, record.backend) for record in workflow._orla.records()]


@pytest.fixture
def light() -> Iterator[StubEngine]:
    with StubEngine(slots=2) as running:
        yield running


@pytest.fixture
def heavy() -> Iterator[StubEngine]:
    with StubEngine(slots=2) as running:
        yield running


@pytest.fixture
def two(light: StubEngine, heavy: StubEngine, make_orla: MakeOrla) -> Orla:
    """The paper's two engines."""
    backends = at(light, "light", engine="llamacpp"), at(heavy, "heavy", engine="llamacpp")
    return make_orla(*backends, stage_policy="priority", memory="flush_at_boundary")


def support(orla: Orla, **policy: Any) -> Workflow:
    """Figure 5, with the builders of Figures 6 and 7."""

    def review(upstream: Upstream, given: Any) -> str:
        return f"Review {upstream['classify'].text} for: {given['ticket']}"

    def urgency(upstream: Upstream, given: Any) -> Hints:
        urgent = upstream["classify"].parsed.category in ("billing", "technical")
        return Hints(priority=8 if urgent else 5, tenant="desk")

    classify = Stage("classify", "light", prompt=lambda _, given: given["ticket"], response_format=Classification)
    check = Stage("policy_check", "heavy", mode="agent_loop", tools=[read_policy], prompt=review, **policy)
    reply = Stage(
        "reply", "heavy", mode="agent_loop", tools=[read_policy], hints=urgency, cache="preserve",
        messages=lambda upstream, _: [*upstream["policy_check"].messages, HumanMessage("write")],
    )  # fmt: skip
    route = Stage("route_ticket", "heavy", mode="agent_loop", prompt=lambda upstream, _: upstream["classify"].text)
    workflow = Workflow(orla, "support").add_stage(classify, check, reply, route)
    return workflow.add_dependency(check, classify).add_dependency(reply, check).add_dependency(route, classify)


def classified(category: str) -> Callable[[Seen], Reply | None]:
    return lambda seen: Reply(text=f'{{"category": "{category}"}}') if "lamp" in seen.last else None


# ── the paper's figures ──────────────────────────────────────────────────────────────────────────────


def test_figure_5_runs_each_stage_once_in_its_order_where_it_says(two: Orla) -> None:
    workflow = support(two)
    results = workflow.execute(TICKET)
    went = stages_of(workflow)
    assert went[0] == ("classify", "light") and went[-2:] == [("reply", "heavy")] * 2
    assert sorted(went[1:-2]) == [("policy_check", "heavy")] * 2 + [("route_ticket", "heavy")]
    assert list(results) == ["classify", "policy_check", "reply", "route_ticket"]
    assert results["classify"].parsed == Classification(category="billing")
    prompt, asked, told, answer = results["policy_check"].messages
    assert isinstance(asked, AIMessage) and asked.tool_calls and isinstance(told, ToolMessage)
    assert told.text.startswith("policy of") and answer.text == results["policy_check"].text
    assert results["policy_check"].message.response_metadata["orla"]["stage"] == "policy_check"
    assert results["reply"].messages[:4] == (prompt, asked, told, answer)


@pytest.mark.parametrize(("category", "priority"), [("billing", 8), ("technical", 8), ("general", 5)])
def test_figure_6_the_classification_sets_the_priority_of_the_reply(
    light: StubEngine, two: Orla, category: str, priority: float
) -> None:
    light.rule = classified(category)
    asyncio.run(support(two).aexecute(TICKET))
    said = {record.stage: (record.priority, record.tenant) for record in two.records()}
    assert said == {
        "classify": (0, None), "policy_check": (0, None), "route_ticket": (0, None), "reply": (priority, "desk"),
    }  # fmt: skip


def test_a_run_can_still_be_prioritized(two: Orla) -> None:
    def prompt(upstream: Upstream, given: Any) -> str:
        assert two.prioritize(None, 3)
        return "hi"

    workflow = Workflow(two).add_stage(Stage("ask", "light", prompt=prompt, hints=Hints(priority=1)))
    workflow.execute(None)
    assert two.records()[-1].priority == 3


def test_figure_7_the_classification_is_in_the_prompt(light: StubEngine, heavy: StubEngine, two: Orla) -> None:
    light.rule = classified("technical")
    support(two).execute(TICKET)
    prompts = [seen.body["messages"][0]["content"] for seen in heavy.chats]
    assert 'Review {"category": "technical"} for: my lamp was charged 2 times' in prompts


def test_figure_8_flushed_at_a_switch_kept_between_stages_flushed_at_the_end(
    light: StubEngine, heavy: StubEngine, two: Orla
) -> None:
    erased: dict[str, tuple[int, int]] = {}

    def watch(seen: Seen) -> Reply:
        if "Review" in seen.last:
            light.wait(lambda engine: engine.erased == 1)  # while policy_check runs, not at the end
        erased[seen.last.split()[0]] = light.erased, heavy.erased
        return OK

    heavy.rule = watch
    support(two).execute(TICKET)
    assert erased["Review"] == (1, 0) and erased["write"] == (1, 0)
    how = {record.stage: (record.cache_action, record.cached_tokens) for record in two.records()}
    assert how["reply"][0] == "reused" and (how["reply"][1] or 0) > 0
    taken = sum(record.backend == "heavy" and record.cache_action == "claimed" for record in two.records())
    heavy.wait(lambda engine: engine.erased == taken)
    assert all(backend.memory.workflows == 0 for backend in two.statistics().backends.values())


def test_preserve_keeps_the_cache_over_a_switch(light: StubEngine, two: Orla) -> None:
    first = Stage("first", "light", prompt=say("a"))
    for cache, again in (("auto", "claimed"), ("preserve", "reused")):
        second = Stage("second", "heavy", prompt=say("b"), cache=cache)  # type: ignore[arg-type]
        third = Stage("third", "light", prompt=say("a"))
        workflow = Workflow(two).add_stage(first, second, third)
        workflow.add_dependency(second, first).add_dependency(third, second).execute(None)
        assert two.records()[-1].cache_action == again, cache


def test_flush_frees_the_cache_when_the_stage_is_done_and_not_at_each_turn(
    light: StubEngine, heavy: StubEngine, make_orla: MakeOrla
) -> None:
    orla = make_orla(
        at(light, "light", engine="llamacpp"), at(heavy, "heavy", engine="llamacpp"), memory="release_only"
    )
    support(orla).execute(TICKET)
    assert (light.erased, heavy.erased) == (0, 0), "nothing is erased under this policy"
    support(orla, cache="flush").execute(TICKET)
    heavy.wait(lambda engine: engine.erased >= 1)
    turns = [(record.stage, record.cache_action) for record in orla.records()[6:]]
    assert [how for stage, how in turns if stage == "policy_check"][1] == "reused", "as its first turn left it"
    assert next(how for stage, how in turns if stage == "reply") != "reused"


# ── what a stage does ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_join_starts_once_when_all_are_done(engine: StubEngine, orla: Orla, asynchronous: bool) -> None:
    order, starts = [], threading.Lock()

    def named(name: str, *, far: bool = False) -> Stage:
        def prompt(upstream: Upstream, given: Any) -> str:
            with starts:
                order.append((name, list(upstream)))
            return name

        return Stage(name, prompt=prompt)

    workflow = Workflow(orla).add_stage(*(named(name) for name in ("join", "a", "b", "far")))
    workflow.add_dependency("far", "b").add_dependency("join", "a", "far", "a")
    results = asyncio.run(workflow.aexecute(None)) if asynchronous else workflow.execute(None)
    assert sorted(order[:2]) == [("a", []), ("b", [])], "branches know nothing of each other"
    assert order[2:] == [("far", ["b"]), ("join", ["a", "b", "far"])]
    assert sorted(results) == ["a", "b", "far", "join"] and len(engine.chats) == 4


def test_branches_run_at_once(engine: StubEngine, orla: Orla) -> None:
    engine.rule = lambda seen: Reply(before_s=0.1)
    Workflow(orla).add_stage(*(Stage(name, prompt=say(name)) for name in ("a", "input", "results"))).execute(None)
    assert engine.peak == 3


def test_a_stage_without_a_backend_is_mapped_by_the_orla(
    engine: StubEngine, other_engine: StubEngine, make_orla: MakeOrla
) -> None:
    orla = make_orla(at(engine, "main"), at(other_engine, "other"), mapper={"*": "other", "own": "other"})
    workflow = Workflow(orla).add_stage(Stage("own", "main", prompt=say("a")), Stage("free", prompt=say("b")))
    workflow.execute(None)
    assert sorted(stages_of(workflow)) == [("free", "other"), ("own", "main")]
    orla.variant("moved", {"own": "other"})
    workflow.execute(None, {"configurable": {"orla": {"variant": "moved"}}})
    assert ("own", "other") in stages_of(workflow)


def test_without_any_mapping_the_first_backend_serves(engine: StubEngine, make_orla: MakeOrla) -> None:
    workflow = Workflow(make_orla(at(engine))).add_stage(Stage("ask", prompt=say("a")))
    assert workflow.execute(None)["ask"].text == "1 user said: a"


def test_a_stage_is_skipped_when_its_condition_says_no(engine: StubEngine, orla: Orla) -> None:
    async def asks_for_more(upstream: Upstream, given: Any) -> bool:
        return bool(given["more"])

    def end(upstream: Upstream, given: Any) -> str:
        if "middle" not in upstream:
            with pytest.raises(KeyError, match="'middle' was skipped"):
                upstream["middle"]
        return f"after {len(upstream)}"

    workflow = Workflow(orla).add_stage(
        Stage("begin", prompt=say("a")),
        Stage("middle", prompt=say("b"), when=asks_for_more),
        Stage("end", prompt=end),
    )
    workflow.add_dependency("middle", "begin").add_dependency("end", "middle")
    graph = workflow.compile(checkpointer=InMemorySaver())
    thread: Any = {"configurable": {"thread_id": "t"}}
    for more, expected in ((True, "1 user said: after 2"), (False, "1 user said: after 1")):
        results = workflow.results(asyncio.run(graph.ainvoke({"input": {"more": more}}, thread)))
        assert (results["end"].text, "middle" in results) == (expected, more)  # an old result does not come back


async def test_asynchronous_builders(engine: StubEngine, orla: Orla) -> None:
    async def prompt(upstream: Upstream, given: Any) -> str:
        await asyncio.sleep(0)
        return f"hello {given}"

    async def messages(upstream: Upstream, given: Any) -> list[Any]:
        return [SystemMessage("be brief"), ("user", upstream["one"].text)]

    workflow = Workflow(orla).add_stage(Stage("one", prompt=prompt), Stage("two", messages=messages))
    workflow.add_dependency("two", "one")
    results = await workflow.aexecute("you")
    assert results["two"].text == "2 user said: 1 user said: hello you"
    with pytest.raises(StageError, match=r"prompt function of stage 'one' is asynchronous; .*aexecute"):
        await asyncio.to_thread(workflow.execute, "you")


def test_a_json_schema_is_asked_for_and_read(engine: StubEngine, orla: Orla) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    loop: list[tuple[Mode, Any]] = [("single", ()), ("agent_loop", [read_policy])]
    for mode, tools in loop:
        stage = Stage("count", prompt=say("12 lamps"), response_format=schema, mode=mode, tools=tools, max_tokens=50)
        assert Workflow(orla).add_stage(stage).execute(None)["count"].parsed == {"n": 12}
    sent = [seen.body for seen in engine.chats]
    assert [body.get("response_format") is not None for body in sent] == [True, False, False, True]
    assert sent[0]["response_format"]["json_schema"]["schema"] == schema
    assert [body.get("tool_choice") for body in sent[1:]] == [None, None, "none"] and "tools" in sent[-1]
    assert all(body["max_completion_tokens"] == 50 for body in sent)


# ── through LangGraph ────────────────────────────────────────────────────────────────────────────────


def strict_saver() -> InMemorySaver:
    """A checkpointer that lets nothing through but what LangGraph and LangChain declare safe."""
    return InMemorySaver(serde=JsonPlusSerializer(allowed_msgpack_modules=None))


def test_results_survive_an_interrupt_and_a_second_run_on_the_thread(light: StubEngine, two: Orla) -> None:
    workflow = support(two)
    graph = workflow.compile(checkpointer=strict_saver(), interrupt_before=["reply"])
    thread: Any = {"configurable": {"thread_id": "t"}}
    paused = workflow.results(graph.invoke({"input": TICKET}, thread))
    assert sorted(paused) == ["classify", "policy_check", "route_ticket"]
    assert graph.get_state(thread).next == ("reply",)
    done = workflow.results(graph.invoke(None, thread))
    assert done["classify"].parsed == Classification(category="billing")
    assert done["reply"].messages[:4] == paused["policy_check"].messages
    assert next(r.priority for r in two.records() if r.stage == "reply") == 8, "computed from what was saved"
    assert {record.workflow for record in two.records()} == {"t"}

    light.rule = classified("general")
    graph.invoke({"input": TICKET}, thread)
    again = workflow.results(graph.invoke(None, thread))
    assert again["classify"].parsed.category == "general" and again["reply"].text
    assert workflow.results(graph.get_state(thread).values) == again


def test_a_tool_may_ask_a_human_and_its_stage_starts_over(engine: StubEngine, orla: Orla) -> None:
    @tool
    def refund(amount: int) -> str:
        """Refund an amount."""
        return f"{amount}: {interrupt('refund it?')}"

    stage = Stage("refund", mode="agent_loop", tools=[refund], prompt=say("refund 5"))
    workflow = Workflow(orla).add_stage(stage)
    graph = workflow.compile(checkpointer=strict_saver())
    thread: Any = {"configurable": {"thread_id": "t"}}
    assert graph.invoke({"input": None}, thread)["__interrupt__"][0].value == "refund it?"
    results = workflow.results(graph.invoke(Command(resume="yes"), thread))
    assert results["refund"].messages[2].text == "5: yes"
    assert len(engine.chats) == 3, "one turn before the interrupt, two after it"


def test_streaming_is_langgraphs(orla: Orla) -> None:
    one, two = Stage("one", prompt=say("a b")), Stage("two", prompt=lambda upstream, _: upstream["one"].text)
    graph = Workflow(orla).add_stage(one, two).add_dependency(two, one).compile()
    pieces: dict[str, str] = {}
    for chunk, metadata in graph.stream({"input": None}, stream_mode="messages"):
        pieces[metadata["langgraph_node"]] = pieces.get(metadata["langgraph_node"], "") + chunk.text
    assert pieces == {"one": "1 user said: a b", "two": "1 user said: 1 user said: a b"}
    updates = [list(update) for update in graph.stream({"input": None}, stream_mode="updates")]
    assert updates == [["one"], ["two"]]


def test_what_is_added_later_changes_the_next_graph_only(orla: Orla) -> None:
    workflow = Workflow(orla).add_stage(Stage("one", prompt=say("a")))
    graph = workflow.compile()
    assert list(workflow.execute(None)) == ["one"]
    workflow.add_stage(Stage("two", prompt=say("b")))
    assert list(workflow.execute(None)) == ["one", "two"]
    assert list(graph.invoke({"input": None})["results"]) == ["one"]


def test_a_workflow_may_be_a_node_of_a_graph(engine: StubEngine, make_orla: MakeOrla) -> None:
    orla = make_orla(at(engine), at(engine, "other"), mapper={"*": "main"})
    inner = Workflow(orla, "inner").add_stage(Stage("ask", "other", prompt=say("a"), hints=Hints(priority=4)))
    outer: Any = StateGraph(dict).add_node("inner", inner.compile()).add_edge(START, "inner")
    orla.wrap(outer).invoke({"input": None})
    assert [(r.stage, r.backend, r.priority) for r in orla.records()] == [("inner|ask", "other", 4)]


def test_it_works_with_orla_disabled(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORLA_DISABLED", "1")
    with Orla([at(engine)]) as orla:
        stage = Stage("ask", "main", prompt=say("a"), cache="flush", hints=Hints(priority=1))
        assert Workflow(orla).add_stage(stage).execute(None)["ask"].text == "1 user said: a"


# ── what goes wrong ──────────────────────────────────────────────────────────────────────────────────


def failing(stage: Stage, orla: Orla) -> BaseException:
    with pytest.raises(Exception) as raised:
        Workflow(orla).add_stage(stage).execute(None)
    return raised.value


def test_failures_name_the_stage(engine: StubEngine, orla: Orla) -> None:
    def broken(upstream: Upstream, given: Any) -> str:
        return str(given["ticket"])

    def told(error: BaseException) -> str:
        return "\n".join([str(error), *getattr(error, "__notes__", ())])

    error = failing(Stage("ask", prompt=broken), orla)
    assert isinstance(error, TypeError) and "in the prompt function of stage 'ask'" in told(error)
    error = failing(Stage("ask", prompt=lambda upstream, _: upstream["aks"].text), orla)
    assert isinstance(error, KeyError) and "stage 'aks' does not come before 'ask'" in told(error)
    error = failing(Stage("ask", prompt=lambda *_: ["hi"]), orla)  # type: ignore[arg-type, return-value]
    assert isinstance(error, StageError) and "'ask': its prompt function returned list, expected str" in str(error)
    assert not engine.chats

    engine.rule = lambda seen: Reply(text="not what was asked for")
    two = Workflow(orla).add_stage(Stage("ask", prompt=say("a"), response_format=Classification))
    two.add_stage(Stage("next", prompt=say("b"))).add_dependency("next", "ask")
    with pytest.raises(StageError) as raised:
        two.execute(None)
    error = raised.value
    assert len(engine.chats) == 1, "it fails where it is, before the next stage"
    assert "'ask': its answer is no Classification: 'not what" in str(error)
    engine.rule = lambda seen: Reply(status=400)
    assert "'ask'" in told(failing(Stage("ask", prompt=say("a")), orla)), "what an engine answers stays what it is"


def test_an_agent_loop_ends(engine: StubEngine, orla: Orla) -> None:
    turns = iter(range(9))

    @tool
    def more(n: int) -> str:
        """Ask for more."""
        if next(turns) > 6:
            raise OSError("the tool is broken")
        return "more"

    def loop(upstream: Upstream, given: Any) -> list[Any]:
        return [HumanMessage("more 3")]

    stage = Stage("loop", mode="agent_loop", tools=[more], max_turns=1, messages=loop)
    error = failing(stage, orla)
    assert isinstance(error, StageError) and "'loop' still asks for tools after 1 turns; raise max_turns" in str(
        error
    )
    for _ in range(6):
        next(turns)
    assert isinstance(failing(stage, orla), OSError)

    @tool
    def leave(call: Annotated[str, InjectedToolCallId]) -> Any:
        """Change the graph's state."""
        return Command(update={"messages": [ToolMessage("x", tool_call_id=call)]})

    error = failing(Stage("loop", mode="agent_loop", tools=[leave], messages=loop), orla)
    assert isinstance(error, StageError) and "a tool returned a Command" in str(error)


def test_hints_that_fail_leave_the_stage_without_hints(orla: Orla, caplog: pytest.LogCaptureFixture) -> None:
    stage = Stage("ask", prompt=say("a"), hints=lambda upstream, _: {"prority": 8})
    assert Workflow(orla).add_stage(stage).execute(None)["ask"].text
    assert orla.records()[-1].priority == 0
    assert "stage 'ask': its hints: unknown hint 'prority'; did you mean 'priority'" in caplog.text


def test_a_stages_hints_function_may_return_a_dict(orla: Orla) -> None:
    stage = Stage("ask", prompt=say("a"), hints=lambda upstream, _: {"priority": 8}, cache="preserve")
    assert Workflow(orla).add_stage(stage).execute(None)["ask"].text
    assert orla.records()[-1].priority == 8


def faults(workflow: Workflow) -> list[str]:
    with pytest.raises(WorkflowError) as raised:
        workflow.compile()
    head, *found = str(raised.value).split("\n  - ")
    assert head == "workflow 'workflow' cannot run:"
    return found


def test_a_cycle_is_named(orla: Orla) -> None:
    workflow = Workflow(orla).add_stage(*(Stage(name, prompt=say(name)) for name in "abcd"))
    workflow.add_dependency("b", "a").add_dependency("c", "b").add_dependency("a", "c").add_dependency("d", "a")
    (fault,) = faults(workflow)
    ring = fault.removeprefix("its dependencies form a cycle: ").split(" → ")
    assert ring[0] == ring[-1] and "".join(ring).replace("'", "") in ("abca", "bcab", "cabc")
    (itself,) = faults(Workflow(orla).add_stage(Stage("a", prompt=say("a"))).add_dependency("a", "a"))
    assert itself == "its dependencies form a cycle: 'a' → 'a'"


def test_all_that_is_wrong_is_told_at_once_before_anything_runs(engine: StubEngine, orla: Orla) -> None:
    wrong: Any = Stage("wrong", prompt="text", max_turns=0, cache="keep", hints=3, mode="loop", response_format={})  # type: ignore[arg-type]
    elsewhere = Backend("main", "http://127.0.0.1:9/v1")
    workflow = Workflow(orla).add_stage(
        Stage("classify"), Stage("twice", prompt=say("a")), Stage("twice", prompt=say("b")),
        Stage("both", prompt=say("a"), messages=lambda *_: []), Stage("idle", prompt=say("a"), tools=[read_policy]),
        Stage("moved", elsewhere, prompt=say("a")), wrong,
        *(Stage(name, prompt=say("a")) for name in ("a|b", "a:b", "__end__", "*", "")),
    )  # fmt: skip
    workflow.add_dependency("both", "clasify").add_dependency("nobody", "idle")
    found = "\n".join(faults(workflow))
    for part in (
        "stage 'both' needs 'clasify', which was not added by add_stage; did you mean 'classify'?",
        "'nobody' has needs, but was not added",
        "2 stages are named 'twice'",
        "stage 'classify': it has neither a prompt nor a messages builder",
        "stage 'both': it has both a prompt and a messages builder",
        "stage 'idle': its tools would never be run in mode 'single'; say mode='agent_loop'",
        "stage 'moved': backend 'main' at http://127.0.0.1:9/v1 is not the Orla's of that name",
        "stage 'wrong': mode 'loop' is not one of 'single', 'agent_loop'",
        "stage 'wrong': max_turns must be at least 1, got 0",
        "stage 'wrong': cache 'keep' is not one of 'auto', 'preserve', 'flush'",
        "stage 'wrong': hints must be Hints or a function that returns them, got int",
        "stage 'wrong': its prompt must be a function of (upstream, given), got str",
        "stage 'wrong': response_format must be a pydantic model or a JSON schema with a 'type', got {}",
        "stage 'a|b': '|' is a reserved character",
        "stage 'a:b': ':' is a reserved character",
        "stage '__end__': Node `__end__` is reserved",
        "stage '*': '*' means any stage in mappings",
        "stage '': a stage's name must be text that is not empty",
    ):
        assert part in found, part
    assert faults(Workflow(orla)) == ["it has no stages; add some by add_stage"]
    assert not engine.chats


def test_what_the_orla_cannot_serve_is_a_mapping_error(orla: Orla) -> None:
    with pytest.raises(MappingError, match=r"stage 'ask' is mapped to backend 'mian'.*did you mean 'main'"):
        Workflow(orla).add_stage(Stage("ask", "mian", prompt=say("a"))).compile()
    unknown = Backend("other", "http://127.0.0.1:9/v1")
    with pytest.raises(MappingError, match="stage 'ask' is mapped to backend 'other', which does not exist"):
        Workflow(orla).add_stage(Stage("ask", unknown, prompt=say("a"))).compile()
    with pytest.raises(WorkflowError, match="the first argument is the Orla"):
        Workflow("support", orla)  # type: ignore[arg-type]


def test_a_tool_that_is_none_names_its_stage(orla: Orla) -> None:
    def undescribed(x: int) -> int:
        return x

    with pytest.raises(ValueError, match="docstring") as raised:
        Workflow(orla).add_stage(Stage("ask", prompt=say("a"), mode="agent_loop", tools=[undescribed])).compile()
    assert "in stage 'ask' of workflow 'workflow'" in raised.value.__notes__


# ── the example ──────────────────────────────────────────────────────────────────────────────────────


def test_the_example_answers_a_ticket(
    light: StubEngine, heavy: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    runpy.run_path(str(EXAMPLE))["main"](["--light", light.url, "--heavy", heavy.url, "my lamp is dark"])
    printed = capsys.readouterr().out
    assert 'classify      {"category": "billing"' in printed and "reply         heavy, priority 8" in printed
    assert light.chats[0].body["model"] == MODEL
    talk = [seen.body["messages"] for seen in heavy.chats if "answer by email" in seen.last]
    assert "double_charge" in talk[0][2]["content"], "the tool read the policy of the category"


def test_the_example_explains_itself() -> None:
    done = subprocess.run([sys.executable, str(EXAMPLE), "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "Figures 5 to 8" in done.stdout
