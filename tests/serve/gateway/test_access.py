"""Access policies and labels at the gateway: keys' tags, claimed tags and labels, and how a denial is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from orla_lg import AccessPolicy, Orla
from orla_lg.core.guard.flow import StageLabels
from tests.conftest import at
from tests.serve.gateway.served import GatewayServer
from tests.stub_engine import MODEL, StubEngine

DENY_RED = AccessPolicy("no red", ["team:red"], ["backend:main"], "deny")
ONLY_BLUE = AccessPolicy("blue", ["team:blue"], ["backend:main"])
NO_PII = AccessPolicy("no pii", ["backend:main"], ["data:pii"], "deny")

CHAT: Any = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
BODIES: Any = {
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"model": MODEL, "input": "hi"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
    "/v1/messages/count_tokens": CHAT,
    "/v1/completions": {"model": MODEL, "prompt": "hi"},
    "/v1/embeddings": {"model": MODEL, "input": "hi"},
}


@pytest.fixture
def serve(engine: StubEngine, make_orla: Callable[..., Orla]) -> Iterator[Callable[..., Any]]:
    """Return a function that serves an Orla with policies, and returns what posts to it."""
    running: list[GatewayServer] = []

    def begin(*policies: AccessPolicy, **key: Any) -> Callable[..., httpx.Response]:
        served = GatewayServer(make_orla(at(engine), policies=policies), **key).__enter__()
        running.append(served)
        begin.orla = served.orla  # type: ignore[attr-defined]

        def post(path: str = "/v1/chat/completions", body: Any = None, **headers: str) -> httpx.Response:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            if served.key:
                sent["authorization"] = f"Bearer {served.key}"
            return httpx.post(served.url + path, json=BODIES[path] if body is None else body, headers=sent)

        return post

    yield begin
    for each in running:
        each.__exit__(None, None, None)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_denied_request_is_a_403_in_its_wires_words(
    serve: Any, engine: StubEngine, path: str, stream: bool
) -> None:
    answer = serve(DENY_RED)(path, {**BODIES[path], "stream": stream}, x_orla_tag_team="red")
    error = answer.json()["error"]
    assert answer.status_code == 403 and "'no red'" in error["message"] and not engine.chats
    assert error["type"] in ("permission_denied", "permission_error", "invalid_request_error"), error


def test_without_keys_claimed_tags_count_as_the_keys(serve: Any) -> None:
    post = serve(ONLY_BLUE, AccessPolicy("others", ["team:*", "\\*"], ["backend:x"]))
    assert post(x_orla_tag_team="blue").status_code == 200
    assert post(x_orla_tag_team="red").status_code == post().status_code == 403
    assert post(body={**CHAT, "metadata": {"orla": {"tags": {"team": "blue"}}}}).status_code == 200


def test_with_a_key_claimed_tags_only_narrow(serve: Any) -> None:
    post = serve(ONLY_BLUE, AccessPolicy("others", ["role:*"], ["backend:x"]), tags={"role": "app"})
    assert post().status_code == post(x_orla_tag_team="blue").status_code == 403
    post = serve(ONLY_BLUE, DENY_RED, tags={"team": "blue"})
    assert post().status_code == 200
    assert post(x_orla_tag_team="red").status_code == 403  # contradicts the key
    post = serve(AccessPolicy("low", ["level:low"], ["backend:main"], "deny"), tags={"team": "blue"})
    assert post().status_code == 200 and post(x_orla_tag_level="low").status_code == 403


def test_a_tool_of_a_request(serve: Any) -> None:
    post = serve(AccessPolicy("no mail", ["*"], ["tool:mail"], "deny"))
    tools = [{"type": "function", "function": {"name": "mail", "parameters": {"type": "object"}}}]
    assert post(body={**CHAT, "tools": tools}).status_code == 403 and post().status_code == 200
    flat = [{"name": "mail", "input_schema": {"type": "object"}}]
    assert post("/v1/messages", {**CHAT, "max_tokens": 5, "tools": flat}).status_code == 403


def test_claimed_labels_stop_a_call_and_those_after_it_in_its_workflow(serve: Any, engine: StubEngine) -> None:
    post = serve(NO_PII)
    assert post(x_orla_workflow_run="w").status_code == 200
    assert post(x_orla_workflow_run="w", x_orla_labels="pii, other").status_code == 403
    assert post(x_orla_workflow_run="w").status_code == 403  # what came before is in its prompt
    assert post("/v1/messages/count_tokens", x_orla_workflow_run="w").status_code == 403
    assert post(x_orla_workflow_run="other").status_code == 200
    for said in ({"orla": {"labels": ["pii"]}}, {"orla.labels": "pii"}):
        assert post(body={**CHAT, "metadata": said}).status_code == 403
    assert post(x_orla_labels="a/b").status_code == 400


def test_labels_of_stages_in_the_configuration(serve: Any) -> None:
    post = serve(NO_PII)
    serve.orla.core.serving.guard.set_stage_labels({"intake": StageLabels(frozenset({"pii"}))}, "file")
    assert post(x_orla_stage="answer", x_orla_workflow_run="w").status_code == 200
    assert post(x_orla_stage="intake", x_orla_workflow_run="w").status_code == 403
    assert post(x_orla_stage="answer", x_orla_workflow_run="w").status_code == 403


def test_labels_claimed_before_there_are_policies_are_known_later(serve: Any) -> None:
    post = serve()
    assert post(x_orla_workflow_run="w", x_orla_labels="pii").status_code == 200
    serve.orla.policies = [NO_PII]
    assert post(x_orla_workflow_run="w").status_code == 403
