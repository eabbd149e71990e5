"""Access policies and labels over the link: replicas of one server, its keys' tags, and a core that starts again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.graph import END, START, MessagesState, StateGraph

from orla_lg import AccessDenied, AccessPolicy, Orla
from orla_lg.graph.lookahead import look_ahead
from orla_lg.link.views import flat_graph, read_graph
from orla_lg.serve.access.keys import AccessKey, KeyScope, create
from orla_lg.serve.store.store import MemoryStore, Store
from tests.serve.in_thread import Running, server
from tests.stub_engine import StubEngine
from tests.test_access_policies import CLEAN, PII, chain

HERE: Any = {"configurable": {"thread_id": "thread"}}
HI: Any = {"messages": [("user", "hi")]}

CONFIG = """
[backends.weak]
url = "{0}"

[backends.strong]
url = "{1}"

[mapping]
redact = "strong"
"*" = ["weak"]

[[policies]]
name = "no pii on weak"
subjects = ["backend:weak"]
resources = ["data:pii"]
action = "deny"

[[policies]]
name = "no red"
subjects = ["team:red"]
resources = ["backend:weak"]
action = "deny"
"""


@pytest.fixture
def file(tmp_path: Path, engine: StubEngine, other_engine: StubEngine) -> Path:
    path = tmp_path / "orla.toml"
    path.write_text(CONFIG.format(engine.url, other_engine.url))
    return path


@contextlib.contextmanager
def replicas(running: Running, number: int = 2, **settings: Any) -> Iterator[list[Orla]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Orla.remote(running.url, **settings)) for _ in range(number)]


def app(engine: StubEngine, *names: str) -> Any:
    return chain(engine, *names, intake=PII, redact=CLEAN)


def test_a_stage_entered_in_one_process_stops_a_call_in_another(file: Path, engine: StubEngine) -> None:
    with server(file) as running, replicas(running) as (one, other):
        answers = other.wrap(app(engine, "answer"))
        answers.invoke(HI, HERE)
        one.wrap(app(engine, ".intake")).invoke(HI, HERE)
        one.statistics()  # answered by the core once it has heard what was sent before
        with pytest.raises(AccessDenied, match="'answer'") as found:
            answers.invoke(HI, HERE)
        assert found.value.rule == "no pii on weak" and len(engine.chats) == 1
        answers.invoke(HI, {"configurable": {"thread_id": "other"}})


def test_and_not_after_a_declassifying_stage(file: Path, engine: StubEngine) -> None:
    with server(file) as running, replicas(running) as (one, other):
        one.wrap(app(engine, ".intake", "redact", "answer")).invoke(HI, HERE)
        one.statistics()
        other.wrap(app(engine, "answer")).invoke(HI, HERE)
        both = other.wrap(app(engine, ".intake", "answer", "redact"))
        with pytest.raises(AccessDenied, match="'answer'"):
            both.invoke(HI, HERE)


def test_labels_survive_a_restart_of_the_core(file: Path, engine: StubEngine) -> None:
    store: Store = MemoryStore()
    with server(file, store=store) as running, replicas(running, 1) as (one,):
        one.wrap(app(engine, ".intake")).invoke(HI, HERE)
    assert list(store.scan("labels/"))
    with server(file, store=store) as running, replicas(running, 1) as (one,):
        with pytest.raises(AccessDenied, match="'answer'"):
            one.wrap(app(engine, "answer")).invoke(HI, HERE)
        one.signals.thread_deleted("thread")
        one.wrap(app(engine, "answer")).invoke(HI, HERE)
        assert not store.scan("labels/")


def test_what_was_entered_while_there_was_no_core_is_told_to_the_next(file: Path, engine: StubEngine) -> None:
    with server(file) as running:
        with replicas(running, 1) as (one,):
            graph, answers = one.wrap(app(engine, ".intake")), one.wrap(app(engine, "answer"))
            one.core.serving.link.drop("a test cuts it")  # type: ignore[attr-defined]
            graph.invoke(HI, HERE)
            with pytest.raises(AccessDenied, match="'answer'"):
                answers.invoke(HI, HERE)


def test_two_graphs_of_one_name_have_their_own_labels(file: Path, engine: StubEngine) -> None:
    with server(file) as running, replicas(running, 1) as (one,):
        plain = one.wrap(chain(engine, ".intake", "answer").compile(name="app"))
        labelled = one.wrap(app(engine, ".intake", "answer").compile(name="app"))
        for _ in range(2):
            plain.invoke(HI)
            with pytest.raises(AccessDenied):
                labelled.invoke(HI)


def test_a_replicas_tags_count_where_there_are_no_keys_and_narrow_where_there_are(
    file: Path, engine: StubEngine
) -> None:
    store: Store = MemoryStore()
    with server(file, store=store) as running:
        with replicas(running, 1, tags={"team": "red"}) as (red,):
            with pytest.raises(AccessDenied, match="no red") as found:
                red.wrap(app(engine, "answer")).invoke(HI)
            assert found.value.rule == "no red"
    scopes = (KeyScope.LINK,)
    _, secret = create(store, lambda id, hashed: AccessKey(id, "app", hashed, scopes, tags={"team": "red"}))
    with server(file, store=store) as running:
        for tags in ({}, {"team": "blue"}, {"team": "red"}):
            with replicas(running, 1, key=secret, tags=tags) as (one,):
                with pytest.raises(AccessDenied, match="no red"):
                    one.wrap(app(engine, "answer")).invoke(HI)


def test_policies_may_change_while_replicas_are_connected(file: Path, engine: StubEngine) -> None:
    with server(file) as running, replicas(running, 1) as (one,):
        graph = one.wrap(app(engine, "answer"))
        graph.invoke(HI)
        guard = running.orla.core.serving.guard
        running.call(guard.set_policies, [AccessPolicy("stop", ["*"], ["backend:*"], "deny")])
        with pytest.raises(AccessDenied, match="stop"):
            graph.invoke(HI)
        running.call(guard.set_policies, [])
        graph.invoke(HI)


def test_without_a_core_nothing_is_sent_that_policies_were_not_asked_about(file: Path, engine: StubEngine) -> None:
    with server(file) as running:
        orla = Orla.remote(running.url, on_core_lost="direct")
        graph = orla.wrap(app(engine, "answer"))
        graph.invoke(HI)
    with orla, pytest.raises(AccessDenied, match="core is lost"):
        graph.invoke(HI)
    assert len(engine.chats) == 1


def test_labels_that_cannot_be_read_count_as_any(file: Path, engine: StubEngine) -> None:
    with server(file) as running, replicas(running, 1) as (one,):
        graph = one.wrap(app(engine, ".plain"))
        graph.invoke(HI, {**HERE, "metadata": {"orla": {"labels": "pii"}}})
        with pytest.raises(AccessDenied, match="'answer'"):
            one.wrap(app(engine, "answer")).invoke(HI, HERE)


def test_the_labels_of_a_graph_travel_with_it() -> None:
    builder = StateGraph(MessagesState).add_node("intake", lambda state: state, metadata={"orla": PII})
    builder.add_node("redact", lambda state: state, metadata={"orla": CLEAN})
    builder.add_edge(START, "intake").add_edge("intake", "redact").add_edge("redact", END)
    structure = look_ahead(builder.compile())
    assert structure.labels == {"intake": {"pii"}} and structure.declassifies == {"redact": {"pii"}}
    assert read_graph(flat_graph("app", structure, {}))[1] == structure
