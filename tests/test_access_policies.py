"""Access policies and data labels in wrapped graphs: what is denied, before it waits, and by which rule."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.tools import tool
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, MessagesState, StateGraph
from langgraph.types import Command, RetryPolicy, Send, interrupt

from orla_lg import AccessDenied, AccessPolicy, CallRefused, ChatOrla, ConfigError, Orla
from orla_lg.mappers import OneBitStageMapper
from tests.conftest import at, chat
from tests.stub_engine import Reply, StubEngine

HI: Any = {"messages": [("user", "hi")]}
MakeOrla = Callable[..., Orla]

NO_PII = AccessPolicy("no pii on weak", ["backend:weak"], ["data:pii"], "deny")
ELSE = AccessPolicy("else", ["*", "*:*"], ["backend:*", "tool:*", "data:*"])
"""What denies something is an envelope, too: what else a subject may use must be allowed."""


def deny(resource: str, *subjects: str, name: str = "rule") -> AccessPolicy:
    return AccessPolicy(name, subjects or ("*", "*:*"), [resource], "deny")


def nodes(builder: StateGraph[Any], engine: StubEngine, *names: str, **metadata: Any) -> StateGraph[Any]:
    """Add nodes that call a model, and nodes that do not (names with a dot in front)."""
    for name in names:

        def calls(state: Any) -> Any:
            return {"messages": [chat(engine, model="auto").invoke(state["messages"][:1])]}

        def silent(state: Any) -> Any:
            return {}

        plain = name.lstrip(".")
        said = {"orla": metadata[plain]} if plain in metadata else None
        builder.add_node(plain, silent if name.startswith(".") else calls, metadata=said)
    return builder


def chain(engine: StubEngine, *names: str, **metadata: Any) -> StateGraph[Any]:
    builder = nodes(StateGraph(MessagesState), engine, *names, **metadata)
    plain = [name.lstrip(".") for name in names]
    for one, other in zip((START, *plain), (*plain, END), strict=True):
        builder.add_edge(one, other)
    return builder


@pytest.fixture
def two(engine: StubEngine, other_engine: StubEngine, make_orla: MakeOrla) -> Callable[..., Orla]:
    """Return a maker of an Orla with a weak and a strong backend."""
    return lambda **settings: make_orla(
        at(engine, "weak"), at(other_engine, "strong"), **{"mapper": {"*": "weak"}, **settings}
    )


def test_a_denied_call_ends_before_it_waits_and_names_the_rule(two: Any, engine: StubEngine) -> None:
    orla = two(policies=[deny("backend:weak", "team:red")], tags={"team": "red"})
    orla.pause("weak")  # what waits here would not come back
    builder = chain(engine)
    calls = []

    def node(state: Any) -> Any:
        calls.append(1)
        return {"messages": [chat(engine).invoke("hi")]}

    builder = StateGraph(MessagesState).add_node("node", node, retry_policy=RetryPolicy(max_attempts=3))
    builder.add_edge(START, "node")
    with pytest.raises(AccessDenied, match="'rule' denies team:red backend:weak") as found:
        orla.wrap(builder).invoke(HI)
    assert found.value.rule == "rule" and isinstance(found.value, CallRefused) and len(calls) == 1
    (record,) = orla.records()
    assert record.error is not None and "rule" in record.error and not engine.chats


def test_other_tags_are_let_through_and_policies_may_change(two: Any, engine: StubEngine) -> None:
    orla = two(policies=[deny("backend:weak", "team:red")], tags={"team": "blue"})
    graph = orla.wrap(chain(engine, "node"))
    graph.invoke(HI)
    orla.policies = [deny("backend:*")]
    assert [each.name for each in orla.policies] == ["rule"]
    with pytest.raises(AccessDenied):
        graph.invoke(HI)
    orla.policies = []
    graph.invoke(HI)
    assert orla.core.serving.services.guard is None


def test_a_denied_alternative_is_taken_out_and_a_denied_first_one_replaced(
    two: Any, engine: StubEngine, other_engine: StubEngine
) -> None:
    orla = two(policies=[deny("backend:weak"), ELSE], mapper={"*": ["weak", "strong"]})
    graph = orla.wrap(chain(engine, "node"))
    graph.invoke(HI)
    (record,) = orla.records()
    assert record.backend == "strong" and "rule" in record.reason
    orla.policies = [deny("backend:strong"), ELSE]
    engine.script += [Reply(status=503)] * 3
    with pytest.raises(Exception, match="503"):
        graph.invoke(HI)
    assert orla.records()[-1].backend == "weak" and len(other_engine.chats) == 1


@tool
def search(text: str) -> str:
    """Search."""
    return text


def test_each_tool_of_a_request_is_checked(two: Any, engine: StubEngine) -> None:
    def node(state: Any) -> Any:
        return {"messages": [chat(engine).bind_tools([search]).invoke("hi")]}

    builder = StateGraph(MessagesState).add_node("node", node)
    builder.add_edge(START, "node")
    graph = two(policies=[deny("tool:sea*")]).wrap(builder)
    with pytest.raises(AccessDenied, match="tool:search"):
        graph.invoke(HI)


def test_a_call_past_us_is_of_the_backend_external(
    engine: StubEngine, other_engine: StubEngine, make_orla: Any
) -> None:
    orla = make_orla(at(engine), policies=[deny("backend:external")])
    graph = orla.wrap(StateGraph(MessagesState).add_node("node", lambda state: {"messages": [
        chat(other_engine, model="elsewhere").invoke("hi")]}).add_edge(START, "node"))  # fmt: skip
    with pytest.raises(AccessDenied, match="external"):
        graph.invoke(HI)
    orla.policies = []
    graph.invoke(HI)
    assert len(other_engine.chats) == 1


def test_calls_outside_graphs_are_checked(two: Any, engine: StubEngine) -> None:
    orla = two(policies=[deny("backend:weak"), ELSE], mapper=None)
    with pytest.raises(AccessDenied):
        ChatOrla(model="weak", orla=orla).invoke("hi")
    ChatOrla(model="strong", orla=orla).invoke("hi")


# Labels


PII: Any = {"labels": ["pii"]}
CLEAN: Any = {"declassifies": ["pii"]}


def test_a_label_of_an_upstream_stage_that_calls_no_model_stops_a_call_downstream(
    two: Any, engine: StubEngine
) -> None:
    graph = two(policies=[NO_PII]).wrap(chain(engine, "before", ".intake", "answer", intake=PII))
    with pytest.raises(AccessDenied, match="'answer'") as found:
        graph.invoke(HI)
    assert found.value.rule == "no pii on weak" and len(engine.chats) == 1
    assert "carries 'pii', entered with stage 'intake'" in str(found.value)


def test_behind_a_declassifying_stage_it_passes_and_at_that_stage_not_yet(
    two: Any, engine: StubEngine, other_engine: StubEngine
) -> None:
    names = (".intake", "redact", "answer")
    orla = two(policies=[NO_PII], mapper={"redact": "strong", "*": "weak"})
    orla.wrap(chain(engine, *names, intake=PII, redact=CLEAN)).invoke(HI)
    assert [record.backend for record in orla.records()] == ["strong", "weak"]
    graph = two(policies=[NO_PII]).wrap(chain(engine, *names, intake=PII, redact=CLEAN))
    with pytest.raises(AccessDenied, match="'redact'"):
        graph.invoke(HI)


def test_a_label_takes_a_backend_without_the_right_out_of_the_alternatives(two: Any, engine: StubEngine) -> None:
    orla = two(policies=[NO_PII], mapper={"*": ["weak", "strong"]})
    orla.wrap(chain(engine, "before", "intake", "answer", intake=PII)).invoke(HI)
    assert [record.backend for record in orla.records()] == ["weak", "strong", "strong"]


def test_the_next_run_on_the_thread_carries_it_and_a_deleted_thread_does_not(two: Any, engine: StubEngine) -> None:
    builder = StateGraph(MessagesState)
    nodes(builder, engine, "answer", ".intake", intake=PII)
    builder.add_edge(START, "answer").add_edge("answer", "intake").add_edge("intake", END)
    graph = two(policies=[NO_PII]).wrap(builder.compile(InMemorySaver()))
    here: Any = {"configurable": {"thread_id": "t"}}
    graph.invoke(HI, here)
    with pytest.raises(AccessDenied):
        graph.invoke(HI, here)
    graph.invoke(HI, {"configurable": {"thread_id": "other"}})
    graph.checkpointer.delete_thread("t")
    graph.invoke(HI, here)


def test_a_human_in_between_and_a_run_that_failed(two: Any, engine: StubEngine) -> None:
    def redact(state: Any) -> Any:
        if any(message.content == "fail" for message in state["messages"]):
            raise ValueError("not redacted")
        return {}

    builder = StateGraph(MessagesState).add_node("redact", redact, metadata={"orla": CLEAN})
    nodes(builder, engine, "first", ".intake", "answer", intake=PII)
    builder.add_node("human", lambda state: {"messages": [interrupt("?")]})
    for one, other in pairwise([START, "first", "intake", "redact", "human", "answer", END]):
        builder.add_edge(one, other)
    graph = two(policies=[NO_PII]).wrap(builder.compile(InMemorySaver()))
    here: Any = {"configurable": {"thread_id": "t"}}
    for _ in range(2):
        graph.invoke(HI, here)
        graph.invoke(Command(resume="yes"), here)  # it was taken off before
    with pytest.raises(ValueError, match="not redacted"):
        graph.invoke({"messages": [("user", "hi"), ("user", "fail")]}, here)
    with pytest.raises(AccessDenied, match="'first'"):
        graph.invoke(HI, here)  # from the beginning, in a state that holds it as it came in


class Fan(TypedDict):
    messages: Annotated[list[Any], operator.add]


@pytest.mark.parametrize("declared", [True, False])
def test_send_and_joins(two: Any, engine: StubEngine, declared: bool) -> None:
    builder = StateGraph(Fan)
    nodes(builder, engine, ".plan", ".worker", ".other", "join", worker=PII)
    builder.add_edge(START, "plan").add_edge(["worker", "other"], "join").add_edge("join", END)
    builder.add_edge("plan", "other")
    to = ["worker"] if declared else None
    builder.add_conditional_edges("plan", lambda state: [Send("worker", state)] * 2, to)
    with pytest.raises(AccessDenied, match="'join'"):
        two(policies=[NO_PII]).wrap(builder).invoke(HI)


@pytest.mark.parametrize("declared", [True, False])
def test_a_command_that_goes_where_no_edge_leads(two: Any, engine: StubEngine, declared: bool) -> None:
    builder = StateGraph(MessagesState)
    builder.add_node(
        "intake", lambda state: Command(goto="answer"), metadata={"orla": PII},
        destinations=("answer",) if declared else None,
    )  # fmt: skip
    nodes(builder, engine, "answer")
    builder.add_edge(START, "intake")
    with pytest.raises(AccessDenied):
        two(policies=[NO_PII]).wrap(builder).invoke(HI)


def inner(engine: StubEngine, name: str = "draft", **metadata: Any) -> Any:
    return chain(engine, name, **metadata).compile()


def test_a_subgraph_hands_its_labels_on_and_takes_them_in(two: Any, engine: StubEngine) -> None:
    outer = StateGraph(MessagesState).add_node("sub", inner(engine, ".draft", draft=PII))
    nodes(outer, engine, "answer").add_edge(START, "sub").add_edge("sub", "answer")
    with pytest.raises(AccessDenied, match="'answer'"):
        two(policies=[NO_PII]).wrap(outer).invoke(HI)
    outer = StateGraph(MessagesState).add_node("sub", inner(engine))
    nodes(outer, engine, ".intake", intake=PII).add_edge(START, "intake").add_edge("intake", "sub")
    with pytest.raises(AccessDenied, match=r"'sub\|draft'"):
        two(policies=[NO_PII]).wrap(outer).invoke(HI)


def test_a_graph_that_a_nodes_code_calls(two: Any, engine: StubEngine) -> None:
    within = inner(engine, ".draft", draft=PII)
    outer = StateGraph(MessagesState).add_node("calls", lambda state: within.invoke(state))
    nodes(outer, engine, "answer").add_edge(START, "calls").add_edge("calls", "answer")
    orla = two(policies=[NO_PII])
    orla.core.serving.guard.claims(frozenset({"pii"}))
    with pytest.raises(AccessDenied, match="'answer'"):
        orla.wrap(outer).invoke(HI)


def test_labels_and_hints_stand_in_the_same_place(two: Any, engine: StubEngine) -> None:
    orla = two()
    orla.wrap(chain(engine, "node", node={"labels": ["pii"], "priority": 3})).invoke(HI)
    (record,) = orla.records()
    assert record.priority == 3


def test_labels_that_are_none_are_refused_at_wrap(two: Any, engine: StubEngine) -> None:
    orla = two()
    for wrong in ("pii", [3], ["*"]):
        with pytest.raises(ConfigError, match=r"stage 'node': metadata\['orla'\]: labels"):
            orla.wrap(chain(engine, "node", node={"labels": wrong}))


def test_a_judge_does_not_see_what_its_backend_may_not(
    two: Any, engine: StubEngine, other_engine: StubEngine
) -> None:
    judged = OneBitStageMapper(simple="strong", complex_="strong", judge="weak")
    orla = two(policies=[NO_PII], mapper={"answer": judged, "*": "strong"})
    graph = orla.wrap(chain(engine, ".intake", "answer", intake=PII))
    graph.invoke(HI)
    assert not engine.chats and orla.records()[-1].backend == "strong"
    orla.wrap(chain(engine, "answer")).invoke(HI)
    assert engine.chats  # without a label the judge is asked


class Looks:
    """A mapper that notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def map(self, call: Any, backends: Any) -> None:
        self.seen.append(call.access)


def test_mappers_know_what_may_leave(two: Any, engine: StubEngine) -> None:
    looks = Looks()
    no_pii_outside = AccessPolicy("in here", ["backend:external"], ["data:pii"], "deny")
    orla = two(policies=[no_pii_outside])
    graph = orla.wrap(chain(engine, "before", ".intake", "answer", intake=PII), mapper=looks)
    with contextlib.suppress(Exception):
        graph.invoke(HI)
    assert [each.may_leave for each in looks.seen] == [True, False]
    assert looks.seen[1].carried == {"pii"}


# Configuration


TOML = """
tags = {{ team = "red" }}

[backends.weak]
url = "{url}"

[mapping]
"*" = "weak"

[[policies]]
name = "red stays out"
subjects = ["team:red"]
resources = ["backend:weak"]
action = "deny"

[stages.intake]
labels = ["pii"]
"""


def test_a_file_says_the_same(tmp_path: Path, engine: StubEngine) -> None:
    file = tmp_path / "orla.toml"
    file.write_text(TOML.format(url=engine.url))
    with Orla.from_config(file) as orla:
        assert orla.core.serving.guard.source_of("red stays out") == "file"
        with pytest.raises(AccessDenied, match="red stays out"):
            orla.wrap(chain(engine, "node")).invoke(HI)
        orla.core.serving.guard.set_policies([NO_PII], "file")
        with pytest.raises(AccessDenied, match="data:pii"):
            orla.wrap(chain(engine, ".intake", "answer")).invoke(HI)


@pytest.mark.parametrize(
    ("wrong", "fault"),
    [
        ('policies = [{name="a", subjects=["*"], resources=["x"]}]', "policies.0: access policy 'a': resource 'x'"),
        ('policies = [{name="a", subjects=["*"]}]', "policies.0.resources: missing"),
        ('policies = [{name="a", subject=["*"], resources=[]}]', "did you mean 'subjects'"),
        ('policies = [{name="a", subjects=["*"], resources=["tool:x"]}, {name="a", subjects=["*"],'
         ' resources=["tool:x"]}]', "two have the name 'a'"),
        ('tags = {team = ""}\n[stages.x]\nlabels = ["a/b"]', "stages.x: labels"),
        ("[stages.x]\nlabel = []", "did you mean 'labels'"),
        ('tags = {"" = "x"}', "tags"),
    ],
)  # fmt: skip
def test_faults_of_a_file_are_named(tmp_path: Path, wrong: str, fault: str) -> None:
    file = tmp_path / "orla.toml"
    file.write_text(f'{wrong}\n[backends.weak]\nurl = "http://127.0.0.1:9/v1"\n')
    with pytest.raises(ConfigError) as found:
        Orla.from_config(file)
    assert fault in str(found.value)


def test_arguments_that_are_none() -> None:
    for wrong in ({"policies": "x"}, {"policies": [3]}, {"tags": ["x"]}, {"tags": {"x": 3}}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Orla({"main": "http://127.0.0.1:9/v1"}, **wrong)  # type: ignore[arg-type]
