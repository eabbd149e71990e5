"""pyorla 1.0.8 as it is on PyPI, against a running server: each of its calls, and what of it no server can repair."""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pyorla
import pytest
from langchain_core.exceptions import OutputParserException
from langchain_core.tools import tool
from langgraph.graph import START, MessagesState, StateGraph
from langgraph.prebuilt import ToolNode, tools_condition
from pydantic import BaseModel
from pyorla import AccessPolicy, ExecuteRequest, LLMBackend, Message, OrlaClient, OrlaError, SkillManifest

from orla_lg.serve.api.v1 import resources
from orla_lg.serve.posted.items import PostedBackend, PostedPolicy, PostedSkill, PostedWorkflow
from orla_lg.serve.store.store import MemoryStore
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from tests.serve.fixtures import make
from tests.serve.in_thread import Running, server
from tests.serve.processes import ROOT
from tests.stub_engine import MODEL, Fault, Reply, StubEngine

PATIENCE_S = 10.0


class Daemon:
    """A server, an engine that is registered there as ``light``, and pyorla's client."""

    def __init__(self, running: Running, engine: StubEngine) -> None:
        self.running, self.engine = running, engine
        self._before = len(running.orla.records())
        self.client = OrlaClient(running.url)
        until_healthy(self.client)
        self.client.register_backend(self.light)

    @property
    def light(self) -> LLMBackend:
        return LLMBackend("light", self.engine.url, "openai", f"openai:{MODEL}")

    def at(self, name: str, host: str, **more: Any) -> LLMBackend:
        """Return the same engine under another of this machine's names."""
        url = self.engine.url.replace("127.0.0.1", host)
        return LLMBackend(name, url, "openai", f"openai:{MODEL}", **more)

    def stage(self, name: str = "triage", **settings: Any) -> pyorla.Stage:
        stage = pyorla.Stage(name, self.light)
        stage.client = self.client
        for setting, value in settings.items():
            setattr(stage, setting, value)
        return stage

    def records(self) -> list[Any]:
        return self.running.orla.records()[self._before :]

    def empty(self) -> None:
        """Leave nothing to the next test."""
        for workflow in {record.workflow for record in self.records()}:
            self.client.workflow_complete(workflow, ["light"])
        self.client.close()
        posted = self.running.server.posted
        for model in (PostedPolicy, PostedSkill, PostedWorkflow, PostedBackend):
            for name in list(posted.items.of(model)):
                self.running.call(posted.remove, model, name)
        self.running.call(self.running.orla.core.serving.check_integrity)


def until_healthy(client: OrlaClient) -> None:
    """Wait as ``orla_runtime`` does."""
    until_s = time.monotonic() + PATIENCE_S
    while True:
        try:
            client.health()
        except OrlaError:
            assert time.monotonic() < until_s
            time.sleep(0.005)
        else:
            return


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with server() as running:
        yield running


@pytest.fixture
def daemon(running: Running, engine: StubEngine) -> Iterator[Daemon]:
    made = Daemon(running, engine)
    yield made
    made.empty()


def test_its_version_is_the_one_that_was_read() -> None:
    assert importlib.metadata.version("pyorla") == "1.0.8"


# Its process


def test_orla_runtime_starts_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.startswith("ORLA_")]:
        monkeypatch.delenv(name)
    program = tmp_path / "orla"
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m orla_lg "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("ORLA_BIN", str(program))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "adapters")]))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with pyorla.orla_runtime() as client:
        client.health()
        with pytest.raises(OrlaError, match="404"):
            client.execute(ExecuteRequest(backend="light", prompt="hello"))
        url, ending_s = client.base_url, time.monotonic()
    assert time.monotonic() - ending_s < 10  # SIGTERM ends it, and no kill after 15 s
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/api/v1/health")


# Each method


def test_backends(daemon: Daemon) -> None:
    client, schedulers = daemon.client, daemon.running.orla.core.serving.schedulers
    client.health()
    assert schedulers["light"].backend.model == MODEL and schedulers["light"].queue.max_concurrency == 1
    strong = pyorla.new_sglang_backend(MODEL, daemon.engine.url.replace("127.0.0.1", "localhost"))
    strong.set_max_concurrency(4)
    strong.set_queue_capacity(9)
    strong.set_cost_model(pyorla.CostModel(1, 2.5))
    strong.set_quality(0.5)
    client.register_backend(strong)
    found = schedulers[strong.name]
    assert found.queue.max_concurrency == 4 and found.queue.capacity == 9 and found.backend.quality == 0.5
    assert found.backend.cost.output_per_mtoken == 2.5 and found.backend.engine == "sglang"
    assert found.backend.model == MODEL
    client.update_backend(strong.name, cost_model=pyorla.CostModel(3, 4), quality=0.9, max_concurrency=5)
    found = schedulers[strong.name]
    assert found.queue.max_concurrency == 5 and found.backend.quality == 0.9
    assert found.backend.cost.input_per_mtoken == 3
    strong.set_quality(0.25)
    client.register_backend(strong)  # again: replaced
    assert schedulers[strong.name].backend.quality == 0.25
    with pytest.raises(OrlaError) as unknown:
        client.update_backend("nowhere", quality=0.1)
    assert unknown.value.status_code == 404
    with pytest.raises(OrlaError) as wrong:
        client.register_backend(LLMBackend("odd", "ftp://x", "openai", "m"))
    assert wrong.value.status_code == 400 and "ftp" in str(wrong.value)


def test_policies_and_access_checks(daemon: Daemon) -> None:
    client = daemon.client
    assert client.list_policies() == []
    allow = AccessPolicy("reds", ["team:red"], ["backend:light", "tool:search"], "allow")
    deny = AccessPolicy("no pii", ["backend:light"], ["data:pii"], "deny")
    for policy in (allow, deny, allow):
        client.add_policy(policy)
    assert sorted(client.list_policies(), key=lambda each: each.name) == [deny, allow]
    assert client.check_access({"team": "red"}, backend="light", tools=["search"])[0]
    allowed, reason = client.check_access({"team": "red"}, backend="heavy")
    assert not allowed and "reds" in reason
    assert not client.check_access({"team": "red"}, tools=["delete"])[0]
    assert client.check_access({"team": "blue"}, backend="heavy", tools=["delete"]) == (True, "")
    allowed, reason = client.check_access({"team": "red"}, backend="light", data_labels=["pii"])
    assert not allowed and "no pii" in reason
    client.remove_policy("no pii")
    assert client.list_policies() == [allow]
    with pytest.raises(OrlaError) as unknown:
        client.remove_policy("no pii")
    assert unknown.value.status_code == 404
    with pytest.raises(OrlaError) as wrong:
        client.add_policy(AccessPolicy("bad", ["x"], ["model:light"], "allow"))
    assert wrong.value.status_code == 400 and "model:light" in str(wrong.value)


def test_skills(daemon: Daemon) -> None:
    client = daemon.client
    assert client.list_skills() == []
    manifest = SkillManifest("mail", ["light"], ["send"], ["pii"])
    client.register_skill(manifest)
    client.register_skill(SkillManifest("free"))
    assert client.list_skills() == [SkillManifest("free"), manifest]
    assert client.check_access({}, backend="light", tools=["send"], data_labels=["pii"], skill_id="mail")[0]
    assert client.check_access({}, backend="any", tools=["any"], skill_id="free")[0]
    for asked in ({"backend": "heavy"}, {"tools": ["delete"]}, {"data_labels": ["secret"]}):
        allowed, reason = client.check_access({}, skill_id="mail", **asked)  # type: ignore[arg-type]
        assert not allowed and "manifest" in reason
    allowed, reason = client.check_access({}, skill_id="nothing")
    assert not allowed and "not registered" in reason
    client.add_policy(AccessPolicy("no mail", ["team:red"], ["skill:mail"], "deny"))
    assert not client.check_access({"team": "red"}, skill_id="mail")[0]
    client.remove_skill("free")
    assert client.list_skills() == [manifest]
    with pytest.raises(OrlaError):
        client.remove_skill("free")


def test_workflows(daemon: Daemon) -> None:
    client, sessions = daemon.client, daemon.running.server.gateway.sessions
    client.register_workflow("w-1", [("a", "b")], {"a": ["pii"]})
    client.execute(ExecuteRequest("light", stage_id="a", workflow_id="w-1", prompt="x"))
    assert len(sessions) == 1
    client.workflow_complete("w-1", ["light"])
    assert len(sessions) == 0
    client.workflow_complete("never registered", ["light"])


def test_of_too_many_workflows_the_oldest_are_forgotten(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "MOST_WORKFLOWS", 4)
    monkeypatch.setattr(resources, "FORGOTTEN_AT_ONCE", 2)
    for number in (3, 1, 2, 0, 3, 4):  # the first one again, so that another one is the oldest
        daemon.client.register_workflow(f"w-{number}", [("a", "b")])
    assert list(daemon.running.server.posted.items.of(PostedWorkflow)) == ["w-0", "w-3", "w-4"]


async def test_the_same_without_waiting(daemon: Daemon) -> None:
    client = daemon.client
    await client.ahealth()
    await client.aregister_backend(daemon.light)
    await client.aupdate_backend("light", quality=0.5)
    await client.aadd_policy(AccessPolicy("p", ["*"], ["tool:x"], "deny"))
    assert [each.name for each in await client.alist_policies()] == ["p"]
    assert not (await client.acheck_access({}, tools=["x"]))[0]
    await client.aremove_policy("p")
    await client.aregister_skill(SkillManifest("s", ["light"]))
    assert [each.name for each in await client.alist_skills()] == ["s"]
    await client.aremove_skill("s")
    await client.aregister_workflow("w", [("a", "b")], {"a": ["x"]})
    assert (await client.aexecute(ExecuteRequest("light", prompt="hello"))).content == "1 user said: hello"
    await client.aworkflow_complete("w", ["light"])
    with pytest.raises(OrlaError) as unknown:
        await client.aexecute(ExecuteRequest("nowhere", prompt="hello"))
    assert unknown.value.status_code == 404 and unknown.value.request_id
    await client.aclose()


def test_names_with_odd_letters(daemon: Daemon) -> None:
    client = daemon.client
    for name in ("org/model", "a b", "größe", "50%"):
        client.add_policy(AccessPolicy(name, ["*"], ["tool:x"], "deny"))
        assert [each.name for each in client.list_policies()] == [name]
        client.remove_policy(name)


# Executes


def test_an_execute_says_what_became_of_it(daemon: Daemon) -> None:
    daemon.client.update_backend("light", cost_model=pyorla.CostModel(1.0, 2.0))
    done = daemon.client.execute(ExecuteRequest("light", prompt="hello you", workflow_id="w", stage_id="s"))
    assert done.content == "1 user said: hello you" and done.tool_calls == []
    metrics, (record,) = done.metrics, daemon.records()
    assert metrics is not None and metrics.prompt_tokens == record.prompt_tokens == 3
    assert metrics.completion_tokens == record.completion_tokens == 5
    assert metrics.estimated_cost_usd == pytest.approx(record.cost_usd) == pytest.approx(13e-6)
    assert metrics.backend_latency_ms is not None and metrics.queue_wait_ms == 0 == metrics.dispatch_ms
    assert (record.workflow, record.stage, record.backend) == ("w", "s", "light")


def test_the_fields_of_an_execute(daemon: Daemon) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "integer"}}}
    stage = daemon.stage(
        max_tokens=50, temperature=0.0, top_p=0.5, reasoning_effort="low", chat_template_kwargs={"a": True},
        response_format=pyorla.StructuredOutputRequest("count", schema, strict=True),
        stage_scheduling_policy="priority", request_scheduling_policy="fcfs",
        scheduling_hints=pyorla.SchedulingHints(2, 7), cache_policy="preserve",
        cache_hints=pyorla.CacheHints(256, flush_on_complete=False), accuracy=0.2, accuracy_policy="prefer",
        tags={"team": "red"}, data_labels=["pii"], _workflow_id="fields",
    )  # fmt: skip
    assert json.loads(stage.execute("give 7").content) == {"n": 7}
    (seen,), (record,) = daemon.engine.chats, daemon.records()
    given = {name: seen.body[name] for name in ("max_tokens", "temperature", "top_p", "reasoning_effort")}
    assert given == {"max_tokens": 50, "temperature": 0.0, "top_p": 0.5, "reasoning_effort": "low"}
    assert seen.body["chat_template_kwargs"] == {"a": True} and seen.body["model"] == MODEL
    assert seen.body["response_format"]["json_schema"] == {"name": "count", "schema": schema, "strict": True}
    unknown = {"tags", "data_labels", "workflow_id", "stage_id", "backend", "cache_policy", "accuracy", "metadata"}
    assert unknown.isdisjoint(seen.body)
    assert (record.stage, record.priority, record.cache_hint) == (stage.id, 7, "preserve")


def test_what_is_posted_for_a_stage_holds_for_executes(daemon: Daemon) -> None:
    said = {"prompt": "Be brief.", "reasoning_effort": "high", "backend": "light"}
    httpx.put(f"{daemon.running.url}/api/v1/stages/s", json=said).raise_for_status()
    daemon.client.execute(ExecuteRequest("light", prompt="hello", stage_id="s", reasoning_effort="low"))
    messages = [Message("system", "Be long."), Message("user", "hello")]
    daemon.client.execute(ExecuteRequest("light", messages=messages, stage_id="s"))
    for seen in daemon.engine.chats:
        assert [each["content"] for each in seen.body["messages"]] == ["Be brief.", "hello"]
        assert seen.body["reasoning_effort"] == "high"
    httpx.delete(f"{daemon.running.url}/api/v1/stages/s").raise_for_status()


def test_flushing_at_the_end_as_hinted(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    freed = list[str]()
    progress = daemon.running.orla.core.serving.progress
    monkeypatch.setattr(progress, "thread_deleted", lambda name, tenant=None: freed.append(name))
    for name, hint in (("stays", False), ("goes", True), ("says nothing", None)):
        hints = None if hint is None else pyorla.CacheHints(flush_on_complete=hint)
        daemon.client.execute(ExecuteRequest("light", prompt="x", workflow_id=name, cache_hints=hints))
        daemon.client.workflow_complete(name, ["light"])
    assert len(freed) == 2 and freed[0] == "goes"


def test_accuracy(daemon: Daemon) -> None:
    client = daemon.client
    for name, quality, price in (("strong", 0.9, 5.0), ("middle", 0.6, 1.0)):
        host = "localhost" if name == "strong" else "127.0.0.2"
        client.register_backend(daemon.at(name, host, quality=quality, cost_model=pyorla.CostModel(price, price)))
    client.update_backend("light", quality=0.3)

    def where(**asked: Any) -> str:
        client.execute(ExecuteRequest("light", prompt="x", max_tokens=3, **asked))
        found: str = daemon.records()[-1].backend
        return found

    assert where() == "light" == where(accuracy=0.2) == where(accuracy=0.95)
    assert where(accuracy=0.8) == "strong" == where(accuracy=0.8, accuracy_policy="strict")
    with pytest.raises(OrlaError, match=r"no backend has quality 0\.95"):
        where(accuracy=0.95, accuracy_policy="strict")


ADD = pyorla.new_tool(
    "add", "Adds one.", {"type": "object", "properties": {"n": {"type": "integer"}}},
    pyorla.tool_runner_from_schema(lambda given: {"sum": given["n"] + 1}),
)  # fmt: skip


@pytest.mark.parametrize("streamed", [False, True])
def test_tools_both_ways(daemon: Daemon, streamed: bool) -> None:
    stage = daemon.stage()
    stage.add_tool(ADD)
    if streamed:
        events = list(stage.execute_stream("what follows 41?"))
        assert [each.type for each in events] == ["tool_call", "done"]
        assert events[0].tool_call == {"name": "add", "arguments": {"n": 41}}
        response = stage.consume_stream(iter(events))
    else:
        response = stage.execute("what follows 41?")
    (result,) = stage.run_tool_calls_in_response(response)
    assert result.output_values == {"sum": 42} and result.id
    said = result.to_message_dict()
    answer = stage.execute_with_messages([
        Message("user", "what follows 41?"), Message("assistant", "", tool_calls=response.tool_calls),
        Message("tool", said["content"], tool_call_id=said["tool_call_id"], tool_name=said["tool_name"]),
    ])  # fmt: skip
    assert answer.content == '3 tool said: {"sum": 42}'
    seen = daemon.engine.chats[-1].body["messages"]
    assert seen[1]["tool_calls"][0]["id"] == result.id == seen[2]["tool_call_id"]


def test_a_stream(daemon: Daemon) -> None:
    events = list(daemon.client.execute_stream(ExecuteRequest("light", prompt="hello you")))
    assert [each.type for each in events] == ["content"] * 5 + ["done"]
    done = events[-1].response
    assert done is not None and "".join(each.content for each in events[:-1]) == done.content
    assert done.metrics is not None and done.metrics.ttft_ms is not None and done.metrics.completion_tokens == 5
    (record,) = daemon.records()
    assert record.error is None


# Errors


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (ExecuteRequest("nowhere", prompt="x"), 404),
        (ExecuteRequest("light"), 400),
        (ExecuteRequest("light", prompt="x", cache_policy="keep"), 400),
    ],
)
def test_a_refusal_is_read_as_an_orla_error(daemon: Daemon, request_: ExecuteRequest, status: int) -> None:
    with pytest.raises(OrlaError) as refused:
        daemon.client.execute(request_)
    assert refused.value.status_code == status and refused.value.request_id
    assert refused.value.body is not None and json.loads(refused.value.body)["success"] is False
    assert "{" not in str(refused.value)


@pytest.mark.parametrize("fault", [Fault.BROKEN, Fault.UNAUTHORIZED, Fault.GARBAGE, Fault.DEAD_BEFORE_HEADERS])
def test_what_an_engine_fails_with_is_too(daemon: Daemon, fault: Fault) -> None:
    status = {Fault.BROKEN: 500, Fault.UNAUTHORIZED: 401}.get(fault, 200)
    daemon.engine.rule = lambda seen: Reply(fault=fault, status=status)
    with pytest.raises(OrlaError) as failed:
        daemon.client.execute(ExecuteRequest("light", prompt="x"))
    assert failed.value.status_code in (500, 502) and "{" not in str(failed.value)[:40]


@pytest.mark.parametrize("fault", [Fault.DEAD_MID_STREAM, Fault.ERROR_EVENT, Fault.NO_DONE])
def test_a_stream_that_fails_half_way_is_no_success(daemon: Daemon, fault: Fault) -> None:
    daemon.engine.rule = lambda seen: Reply(fault=fault, token_s=0.02)  # else it comes at once, and is tried again
    got = list[pyorla.StreamEvent]()
    with pytest.raises(httpx.RemoteProtocolError):
        got.extend(daemon.client.execute_stream(ExecuteRequest("light", prompt="hello you")))
    with pytest.raises(httpx.RemoteProtocolError):
        stage = daemon.stage()
        stage.consume_stream(stage.execute_stream("hello you"), got.append)
    assert got and {each.type for each in got} == {"content"}
    assert all(record.error for record in daemon.records())


def test_its_user_goes_half_way(daemon: Daemon) -> None:
    daemon.engine.rule = lambda seen: Reply(token_s=0.02)
    stream = daemon.client.execute_stream(ExecuteRequest("light", prompt="a b c d e f g h i j k l m n o p"))
    assert next(stream).type == "content"
    stream.close()  # type: ignore[attr-defined]  # a generator
    daemon.engine.wait(lambda seen: seen.in_flight == 0)


def test_keys_go_in_the_url(engine: StubEngine) -> None:
    store = MemoryStore()
    _, control = make(store, "operator", scopes=("use", "view", "control"))
    _, use = make(store, "app", scopes=("use",), tags={"team": "red"}, backends=("light",))
    with server(store=store) as running:
        rest = running.url.removeprefix("http://")
        nobody, app, operator = (
            OrlaClient(f"http://{who}{rest}") for who in ("", f"app:{use}@", f"operator:{control}@")
        )
        until_healthy(nobody)
        with pytest.raises(OrlaError) as refused:
            nobody.execute(ExecuteRequest("light", prompt="x"))
        assert refused.value.status_code == 401 and "a key is needed" in str(refused.value)
        assert "{" not in str(refused.value)
        for backend in ("light", "heavy"):
            host = "127.0.0.1" if backend == "light" else "localhost"
            operator.register_backend(
                LLMBackend(backend, engine.url.replace("127.0.0.1", host), "openai", f"openai:{MODEL}")
            )
        with pytest.raises(OrlaError) as refused:
            app.register_backend(LLMBackend("own", engine.url, "openai", MODEL))
        assert refused.value.status_code == 403
        assert app.execute(ExecuteRequest("light", prompt="x")).content
        with pytest.raises(OrlaError) as refused:
            app.execute(ExecuteRequest("heavy", prompt="x"))
        assert refused.value.status_code == 403 and "may not use backend 'heavy'" in str(refused.value)
        # What an application does by itself needs no scope of an operator's.
        app.register_workflow("w", [("a", "b")])
        app.workflow_complete("w", ["light"])
        assert app.check_access({}, backend="light")[0]
        for client in (nobody, app, operator):
            client.close()


# LangChain and LangGraph


def test_chat_orla_in_a_graph(daemon: Daemon) -> None:
    @tool
    def add(n: int) -> int:
        """Add one."""
        return n + 1

    model = pyorla.ChatOrla(base_url=daemon.running.url, backend="light", temperature=0.0, max_tokens=50)
    bound = model.bind_tools([add])

    def call(state: MessagesState) -> dict[str, Any]:
        return {"messages": [bound.invoke(state["messages"])]}

    builder = StateGraph(MessagesState).add_node("call", call).add_node("tools", ToolNode([add]))
    builder.add_edge(START, "call").add_conditional_edges("call", tools_condition).add_edge("tools", "call")
    graph = builder.compile()
    said = graph.invoke({"messages": [("user", "what follows 41?")]})["messages"]
    assert [message.type for message in said] == ["human", "ai", "tool", "ai"]
    assert said[1].tool_calls[0]["args"] == {"n": 41} and said[2].content == "42"
    assert said[3].content == "3 tool said: 42"
    assert said[3].response_metadata["completion_tokens"] > 0
    pieces = [chunk.content for chunk in model.stream("hello you")]
    assert "".join(map(str, pieces)) == "1 user said: hello you" and len(pieces) > 3
    assert len(daemon.records()) == 3


def test_a_workflow_with_dependencies(daemon: Daemon) -> None:
    client = daemon.client
    flow = pyorla.Workflow(client, tags={"team": "red"})
    stages = {name: daemon.stage(name) for name in ("plan", "left", "right", "join")}
    for stage in stages.values():
        flow.add_stage(stage)
    stages["plan"].prompt = "begin"
    stages["left"].set_stream(True)

    def prompt(*of: str) -> Callable[[dict[str, pyorla.StageResultData]], str]:
        return lambda results: " + ".join(results[stages[name].id].response.content for name in of)  # type: ignore[union-attr]

    for name, of in (("left", ["plan"]), ("right", ["plan"]), ("join", ["left", "right"])):
        stages[name].set_prompt_builder(prompt(*of))
        for before in of:
            flow.add_dependency(stages[name].id, stages[before].id)
    stages["right"].set_execution_mode(pyorla.EXECUTION_MODE_AGENT_LOOP)
    stages["right"].add_tool(ADD)
    results = flow.execute()
    joined = results[stages["join"].id].response
    assert joined is not None and joined.content.startswith("1 user said: 1 user said: 1 user said: begin + ")
    records = daemon.records()
    assert records[0].stage == stages["plan"].id and len(records) == 5
    assert len({record.workflow for record in records}) == 1 == len({record.run for record in records})
    assert len(daemon.running.server.gateway.sessions) == 0  # it said that it is complete


def test_a_workflow_of_a_graph(daemon: Daemon) -> None:
    builder = StateGraph(MessagesState)
    for name in ("read", "redact", "write"):
        builder.add_node(name, lambda state: state)
    builder.add_edge(START, "read").add_edge("read", "redact").add_edge("redact", "write")
    stages = {name: daemon.stage(name) for name in ("read", "redact", "write")}
    stages["read"].set_data_labels(["pii"])
    stages["redact"].set_declassifies(["pii"])
    daemon.client.register_workflow_from_langgraph("w", builder.compile(), stages)
    daemon.client.add_policy(AccessPolicy("no pii", ["backend:light"], ["data:pii"], "deny"))
    with pytest.raises(OrlaError, match="no pii") as denied:
        stages["read"].execute("x")
    assert denied.value.status_code == 403
    with pytest.raises(OrlaError, match="no pii"):  # it is reached from there, and still reads it
        stages["redact"].execute("x")
    assert stages["write"].execute("x").content


# Labels


def test_labels_follow_the_graph(daemon: Daemon) -> None:
    client = daemon.client
    client.register_backend(daemon.at("trusted", "localhost"))
    client.add_policy(AccessPolicy("no pii", ["backend:light"], ["data:pii"], "deny"))
    edges = [("read", "think"), ("think", "redact"), ("redact", "write")]
    client.register_workflow("w", edges, {"redact": ["pii"]})

    def ask(stage: str, backend: str = "light", **more: Any) -> Any:
        return client.execute(ExecuteRequest(backend, stage_id=stage, workflow_id="w", prompt="x", **more))

    assert ask("think").content  # nothing was read yet
    assert ask("read", "trusted", data_labels=["pii"]).content
    for stage in ("think", "redact"):
        with pytest.raises(OrlaError, match="no pii") as denied:
            ask(stage)
        assert denied.value.status_code == 403
        assert ask(stage, "trusted").content
    assert ask("write").content
    # Another workflow has its own.
    client.register_workflow("other", edges)
    assert client.execute(ExecuteRequest("light", stage_id="think", workflow_id="other", prompt="x")).content
    # A call that is denied is never sent.
    before = len(daemon.engine.chats)
    with pytest.raises(OrlaError):
        ask("think")
    assert len(daemon.engine.chats) == before


def test_policies_graphs_and_labels_outlive_the_server(engine: StubEngine) -> None:
    store = MemoryStore()
    think = ExecuteRequest("light", stage_id="think", workflow_id="w", prompt="x")
    with server(store=store) as running:
        first = Daemon(running, engine)
        first.client.register_backend(first.at("trusted", "localhost"))
        first.client.add_policy(AccessPolicy("no pii", ["backend:light"], ["data:pii"], "deny"))
        first.client.register_workflow(
            "w", [("read", "think"), ("read", "redact"), ("redact", "write")], {"redact": ["pii"]}
        )
        read = ExecuteRequest("trusted", stage_id="read", workflow_id="w", prompt="x", data_labels=["pii"])
        assert first.client.execute(read).content
        first.client.close()
    with server(store=store) as running:
        client = OrlaClient(running.url)
        until_healthy(client)
        with pytest.raises(OrlaError, match="no pii"):
            client.execute(think)
        assert client.execute(ExecuteRequest("light", stage_id="write", workflow_id="w", prompt="x")).content
        client.workflow_complete("w", ["light"])
        assert client.execute(think).content  # a new workflow of the same name
        client.close()


def test_tags_and_tools_of_an_execute_are_checked(daemon: Daemon) -> None:
    client = daemon.client
    client.add_policy(AccessPolicy("reds", ["team:red"], ["backend:strong"], "allow"))
    client.add_policy(AccessPolicy("no add", ["team:blue"], ["tool:add"], "deny"))
    with pytest.raises(OrlaError, match="reds"):
        client.execute(ExecuteRequest("light", prompt="x", tags={"team": "red"}))
    client.add_policy(AccessPolicy("jane", ["user:Jane Doe"], ["backend:light"], "deny"))
    with pytest.raises(OrlaError, match="jane"):
        client.execute(ExecuteRequest("light", prompt="x", tags={"user": "Jane Doe"}))
    assert not client.check_access({"user": "Jane Doe"}, backend="light")[0]
    stage = daemon.stage(tags={"team": "blue"})
    assert stage.execute("x").content
    stage.add_tool(ADD)
    with pytest.raises(OrlaError, match="no add"):
        stage.execute("x")
    client.register_skill(SkillManifest("mail", ["strong"]))
    with pytest.raises(OrlaError, match="manifest"):
        client.execute(ExecuteRequest("light", prompt="x", skill_id="mail"))
    with pytest.raises(OrlaError, match="not registered"):
        client.execute(ExecuteRequest("light", prompt="x", skill_id="nothing"))


# What no server can repair


async def test_defect_its_asynchronous_stream_never_yields(daemon: Daemon) -> None:
    stream = daemon.client.aexecute_stream(ExecuteRequest("light", prompt="hello you"))
    assert [event async for event in stream] == []
    assert daemon.records()[0].error is None
    await daemon.client.aclose()


def test_defect_an_error_of_a_streamed_call_is_no_orla_error(daemon: Daemon) -> None:
    with pytest.raises(httpx.ResponseNotRead) as raised:
        list(daemon.client.execute_stream(ExecuteRequest("nowhere", prompt="x")))
    behind = raised.value.__context__
    assert isinstance(behind, httpx.HTTPStatusError) and behind.response.status_code == 404


def test_defect_structured_output_fails_in_the_client(daemon: Daemon) -> None:
    class Answer(BaseModel):
        n: int

    model = pyorla.ChatOrla(base_url=daemon.running.url, backend="light")
    with pytest.raises(KeyError, match="name"):
        model.with_structured_output(Answer.model_json_schema())
    asking = model.with_structured_output(Answer)
    with pytest.raises(OutputParserException, match="Unknown tool type"):
        asking.invoke("give 7")
    (seen,) = daemon.engine.chats  # neither the name of what is asked for nor its fields were sent
    assert seen.body["tools"][0]["function"] == {"name": f"{Answer}", "parameters": {}}


def test_defect_the_choice_of_a_tool_is_dropped(daemon: Daemon) -> None:
    model = pyorla.ChatOrla(base_url=daemon.running.url, backend="light")
    bound = model.bind_tools([{"name": "add", "parameters": ADD.input_schema}], tool_choice="none")
    bound.invoke("what follows 41?")
    (seen,) = daemon.engine.chats
    assert seen.body["tools"] and "tool_choice" not in seen.body


# On an engine


@pytest.mark.engine
def test_on_a_real_engine() -> None:
    with EmbeddedEngine(EngineSettings(slots=2, context_tokens=1024, name="tiny")) as llama, server() as running:
        client = OrlaClient(running.url)
        until_healthy(client)
        client.register_backend(LLMBackend("tiny", llama.url, "llamacpp", f"openai:{llama.name}"))
        asked = ExecuteRequest("tiny", prompt="Say hello.", max_tokens=8, temperature=0.0, workflow_id="w")
        whole = client.execute(asked)
        events = list(client.execute_stream(asked))
        streamed = events[-1].response
        assert whole.content and streamed is not None and streamed.content
        assert streamed.content == "".join(each.content for each in events)
        assert streamed.metrics is not None and streamed.metrics.completion_tokens > 0
        assert streamed.metrics.ttft_ms is not None and streamed.metrics.tpot_ms is not None
        first, second = running.orla.records()
        assert (second.cached_tokens or 0) > 0 and first.workflow == second.workflow == "w"
        client.workflow_complete("w", ["tiny"])
        client.close()
