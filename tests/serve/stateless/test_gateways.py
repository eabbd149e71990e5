"""Gateways without state before one core: what holds at the core's own gateway holds over all of them."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest

from orla_lg import cli
from orla_lg.core.limits.limits import Limit
from orla_lg.link.redis_keys import RedisAddress, with_password
from orla_lg.serve.access.keys import AccessKey, KeyScope, create, named, revoke
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.settings import settings
from orla_lg.serve.stateless.starting import begin_gateway
from orla_lg.serve.store.opening import store_at
from orla_lg.serve.store.store import MemoryStore, Store
from tests.redis_server import RedisServer
from tests.serve.in_thread import PATIENCE_S, Running, RunningGateway, server, stateless
from tests.stub_engine import Gate, Reply, StubEngine

CALL = {"model": "light", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
CHAT = "/v1/chat/completions"


def until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.fixture
def file(tmp_path: Path, engine: StubEngine) -> Path:
    made = tmp_path / "orla.toml"
    made.write_text(
        f'[backends.light]\nurl = "{engine.url}"\nmax_concurrency = 2\n[backends.other]\nurl = "{engine.url}"\n'
        '[mapping]\nplan = "other"\n"*" = "light"\n'
    )
    return made


def make(store: Store, name: str, *scopes: KeyScope, **given: Any) -> str:
    _, secret = create(store, lambda key_id, sha256: AccessKey(key_id, name, sha256, tuple(scopes), **given))
    return secret


@contextlib.contextmanager
def gateways(
    file: Path, count: int = 2, *, store: Store | None = None, key: str | None = None
) -> Iterator[tuple[Running, list[RunningGateway]]]:
    with contextlib.ExitStack() as stack:
        core = stack.enter_context(server(file, store=store))
        until(lambda: core.server.state is CoreState.READY)
        yield core, [stack.enter_context(stateless(core.url, key=key)) for _ in range(count)]


def in_flight(core: Running) -> int:
    return sum(each.queue.in_flight for each in core.orla.core.serving.schedulers.values())


def test_a_call_is_the_cores_and_says_where_it_went(file: Path, engine: StubEngine) -> None:
    with gateways(file, 1) as (core, (gateway,)):
        with openai.OpenAI(base_url=gateway.url + "/v1", api_key="none", max_retries=0) as client:
            whole = client.chat.completions.with_raw_response.create(**CALL)  # type: ignore[arg-type]
            assert whole.headers["x-orla-backend"] == "light" and whole.parse().choices[0].message.content
            stream = client.chat.completions.create(**CALL, stream=True)  # type: ignore[call-overload]
            assert "".join(each.choices[0].delta.content or "" for each in stream if each.choices)
            assert {each.id for each in client.models.list()} >= {"light", "other", "auto"}
            vectors = (
                client.embeddings.create(model="light", input="hello") if "/v1/embeddings" in engine.speaks else None
            )
            assert vectors is None or vectors.data
        with anthropic.Anthropic(base_url=gateway.url, api_key="none", max_retries=0) as client_a:
            said = client_a.messages.create(model="light", max_tokens=5, messages=[{"role": "user", "content": "hi"}])
            assert (
                said.content
                and client_a.messages.count_tokens(
                    model="light", messages=[{"role": "user", "content": "hello you"}]
                ).input_tokens
                > 0
            )
        until(lambda: len(core.orla.records()) == 3)
        record = core.orla.records()[0]
        assert (record.backend, record.error) == ("light", None) and record.prompt_tokens
        assert gateway.orla.records()[0].id == record.id
        assert httpx.get(gateway.url + "/readyz").json() == {"status": "ok", "state": "ready"}


def test_headers_name_workflow_and_stage_and_sessions_are_one_over_gateways(file: Path) -> None:
    said = {"x-orla-workflow-run": "session-1", "x-orla-stage": "plan", "x-orla-priority": "3"}
    with gateways(file) as (core, both):
        for gateway in both:
            answer = httpx.post(gateway.url + CHAT, json={**CALL, "model": "auto"}, headers=said)
            assert answer.headers["x-orla-backend"] == "other"
        until(lambda: len(core.orla.records()) == 2)
        assert {(record.workflow, record.stage, record.priority) for record in core.orla.records()} == {
            ("session-1", "plan", 3.0)
        }
        assert core.orla.statistics().workflows.runs == 2, "one of each gateway, of one workflow"
        asked = {"do": "move", "workflow": "session-1", "backend": "light"}
        assert httpx.post(core.url + "/v1/orla/control", json=asked).is_success
        moved = httpx.post(both[1].url + CHAT, json={**CALL, "model": "auto"}, headers=said)
        assert moved.headers["x-orla-backend"] == "light"
        until(lambda: len(core.orla.records()) == 3)
        assert core.orla.records()[-1].reason.startswith("moved from 'other'")
        odd = httpx.post(both[0].url + CHAT, json={**CALL, "model": "nothing"}, headers={"x-orla-stage": "plan"})
        assert odd.headers["x-orla-backend"] == "other", "its stage is mapped"
        known = httpx.post(both[0].url + CHAT, json={**CALL, "model": "other"})
        assert known.headers["x-orla-backend"] == "other", "the model's name goes first where there is no stage"


def test_the_bound_holds_over_both(file: Path, engine: StubEngine) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    with gateways(file) as (core, both), ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(httpx.post, gateway.url + CHAT, json=CALL, timeout=PATIENCE_S)
                 for gateway in both for _ in range(4)]  # fmt: skip
        queue = core.orla.core.serving.schedulers["light"].queue
        until(lambda: queue.waiting == 6 and engine.in_flight == 2)
        assert (queue.in_flight, engine.peak) == (2, 2)
        gate.open()
        assert all(each.result().is_success for each in asked)
        assert engine.peak == 2
        until(lambda: in_flight(core) == 0)


def test_a_client_that_hangs_up_is_over_at_the_core_too(file: Path, engine: StubEngine) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(mid_gate=gate) if seen.body.get("stream") else Reply(gate=gate)
    with gateways(file, 1) as (core, (gateway,)):
        queue = core.orla.core.serving.schedulers["light"].queue
        with httpx.stream("POST", gateway.url + CHAT, json={**CALL, "stream": True}) as answer:
            parts = answer.iter_raw()  # kept, since an iterator that is dropped hangs up
            next(parts)  # it may be a comment that keeps the connection, before the call has its place
            until(lambda: queue.in_flight == 1)
        until(lambda: queue.in_flight == 0)
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):  # two at the engine, one that waits
                pool.submit(_gives_up, gateway.url)
        until(lambda: queue.in_flight == queue.waiting == 0)
        gate.open()
        errors = [record.error for record in core.orla.records()]
        assert len(errors) == 4 and all(errors), errors


def test_without_a_core_for_its_lease_a_gateway_ends_its_requests_and_others_wait(
    file: Path, engine: StubEngine
) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(mid_gate=gate) if seen.body.get("stream") else Reply(gate=gate)
    with file.open("a") as more:
        more.write("[serve]\nreplica_lease_s = 1.2\ncore_lease_s = 1.0\n")
    store = MemoryStore()
    with ThreadPoolExecutor(3) as pool, contextlib.ExitStack() as stack:
        first = stack.enter_context(server(file, store=store))
        until(lambda: first.server.state is CoreState.READY)
        gateway = stack.enter_context(stateless(first.url))
        whole = pool.submit(httpx.post, gateway.url + CHAT, json=CALL, timeout=PATIENCE_S)
        streamed = pool.submit(_read, gateway.url)
        until(lambda: engine.in_flight == 2)
        port = int(first.url.rpartition(":")[2])
        first.end()
        first.join()
        until(lambda: engine.in_flight == 0)  # its places are others' by now
        assert whole.result().status_code in (502, 503) and streamed.result() == "broken"
        assert httpx.get(gateway.url + "/readyz").json() == {"status": "not_ready", "state": "unlinked"}
        waits = pool.submit(httpx.post, gateway.url + CHAT, json=CALL, timeout=PATIENCE_S)
        gate.open()
        stack.enter_context(server(file, store=store, address=f"127.0.0.1:{port}"))
        assert waits.result().is_success


def _read(url: str) -> str:
    try:
        return httpx.post(url + CHAT, json={**CALL, "stream": True}, timeout=PATIENCE_S).text
    except httpx.RemoteProtocolError:
        return "broken"


def _gives_up(url: str) -> None:
    with contextlib.suppress(httpx.TimeoutException):
        httpx.post(url + CHAT, json=CALL, timeout=0.5)


CORES = [
    ("GET", "/v1/orla/state"), ("POST", "/v1/orla/control"), ("GET", "/metrics"), ("POST", "/api/v1/execute"),
    ("GET", "/page/page.js"), ("GET", "/v1/orla/link"),
]  # fmt: skip


def test_what_only_a_core_answers_names_it(file: Path) -> None:
    with gateways(file, 1) as (core, (gateway,)):
        for method, path in CORES:
            answer = httpx.request(method, gateway.url + path, json={} if method == "POST" else None)
            assert answer.status_code == 421 and core.url in answer.text, path
        assert httpx.get(gateway.url + "/").json()["models"] == "/v1/models"
        assert httpx.get(gateway.url + "/healthz").is_success


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (("--core", "http://127.0.0.1:1"), "--core says where a gateway's core is; give --gateway too"),
        (("--gateway", "--demo"), "--gateway holds no state and takes no lease"),
        (("--gateway", "--port", "0"), "--gateway: which core? give --core"),
    ],
)
def test_what_a_gateway_is_started_with(
    words: tuple[str, ...], fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for name in ("ORLA_SERVER", "ORLA_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["serve", *words]) == 1
    assert fault in capsys.readouterr().err


# Keys


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore()


def post(gateway: RunningGateway, secret: str = "", **said: str) -> httpx.Response:
    headers = {"authorization": f"Bearer {secret}"} if secret else {}
    return httpx.post(gateway.url + CHAT, json=CALL, headers={**headers, **said}, timeout=PATIENCE_S)


def test_keys_are_the_cores_and_their_limits_hold_over_all_gateways(file: Path, store: MemoryStore) -> None:
    link = make(store, "gateways", KeyScope.GATEWAY)
    two = make(store, "two", KeyScope.USE, limits=(Limit(calls=2),))
    with gateways(file, store=store, key=link) as (core, (one, other)):
        assert [post(each, secret).status_code for each in (one, other) for secret in ("", "wrong", link)] == [
            401, 401, 403, 401, 401, 403,
        ]  # fmt: skip
        assert [post(each, two).status_code for each in (one, other, one, other)] == [200, 200, 429, 429]
        assert core.url and httpx.get(one.url + "/v1/models").status_code == 401
        assert httpx.get(one.url + "/readyz").is_success


def test_calls_of_a_key_at_once_are_counted_over_all_gateways(
    file: Path, store: MemoryStore, engine: StubEngine
) -> None:
    gate = Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    link = make(store, "gateways", KeyScope.GATEWAY)
    single = make(store, "single", KeyScope.USE, concurrency=1)
    with gateways(file, store=store, key=link) as (core, (one, other)), ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, one, single)
        until(lambda: in_flight(core) == 1)
        assert post(other, single).status_code == 429
        gate.open()
        assert first.result().is_success
        until(lambda: in_flight(core) == 0)
        assert post(other, single).is_success


def test_a_key_narrows_what_its_calls_may_do(file: Path, store: MemoryStore) -> None:
    link, stage = make(store, "gateways", KeyScope.GATEWAY), {"x-orla-stage": "ask"}
    red = make(store, "red", KeyScope.USE, tenants=("red",), backends=("light",), stages=("plan", "ask"))
    with gateways(file, 1, store=store, key=link) as (core, (one,)):
        assert post(one, red, **stage).is_success
        until(lambda: core.orla.records())
        assert core.orla.records()[-1].tenant == "red"
        assert post(one, red, **stage, **{"x-orla-tenant": "blue"}).status_code == 403
        assert post(one, red, **{"x-orla-stage": "judge"}).status_code == 403
        refused = post(one, red, **{"x-orla-stage": "plan"})
        assert refused.status_code in (400, 403) and "may not use backend" in refused.text
        listed = httpx.get(one.url + "/v1/models", headers={"x-api-key": red}).json()["data"]
        assert {each["id"] for each in listed if each["id"] in ("light", "other")} == {"light"}
        assert post(one, red, **stage, **{"x-orla-workflow-run": "s"}).is_success
        until(lambda: len(core.orla.records()) == 3)
        assert core.orla.statistics().workflows.runs == 1
        assert (core.orla.records()[-1].workflow, core.orla.records()[-1].tenant) == ("s", "red")


def test_a_key_that_is_revoked_ends_at_the_core_at_once(file: Path, store: MemoryStore) -> None:
    link = make(store, "gateways", KeyScope.GATEWAY)
    made = make(store, "app", KeyScope.USE)
    with gateways(file, 1, store=store, key=link) as (core, (gateway,)):
        assert post(gateway, made).is_success
        revoke(store, named(store, "app"), time.time())
        until(lambda: core.server.access.told("") and post(gateway, made).status_code in (401, 403))
        gateway.server.keys._known._entries.clear()
        assert post(gateway, made).status_code == 401
        revoke(store, named(store, "gateways"), time.time())
        until(lambda: httpx.get(gateway.url + "/readyz").status_code == 503)


def test_without_the_scope_a_link_makes_no_gateway(file: Path, store: MemoryStore) -> None:
    link, made = make(store, "link", KeyScope.LINK), make(store, "app", KeyScope.USE)
    with gateways(file, 1, store=store, key=link) as (_, (gateway,)):
        answer = post(gateway, made)
        assert answer.status_code == 403 and "--scope gateway" in answer.text


def test_a_gateway_asks_the_store_where_its_core_is_with_the_stores_password(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("OUR_PASSWORD", "ge/heim@")
    monkeypatch.delenv("ORLA_SERVER", raising=False)
    with RedisServer(tmp_path / "redis", "--requirepass", "ge/heim@") as redis, contextlib.ExitStack() as ending:
        store = store_at(redis.url, "store", password_env="OUR_PASSWORD")
        ending.callback(store.close)
        core = ending.enter_context(server(file, store=store))
        chosen = settings(None, "127.0.0.1:0", reads_file=False)
        table = chosen.table.model_copy(update={"store_password_env": "OUR_PASSWORD"})
        _, orla, has_keys = begin_gateway(replace(chosen, table=table), redis.url, ending)
        assert not has_keys and list(orla.core.serving.schedulers) == list(core.orla.core.serving.schedulers)
        said = repr(orla.core.serving) + f"{orla.statistics()}" + "".join(capsys.readouterr())
        assert "heim" not in said


@pytest.mark.parametrize(
    ("url", "with_it"),
    [
        ("redis://h:1/0", "redis://:a%2Fb@h:1/0"),
        ("rediss://u@h/0?prefix=p", "rediss://u:a%2Fb@h/0?prefix=p"),
        ("redis+unix:///run/r", "redis+unix://:a%2Fb@/run/r"),
        ("redis://u:own@h/0", "redis://u:own@h/0"),
    ],
)
def test_a_password_is_put_into_a_url_that_has_none(url: str, with_it: str) -> None:
    assert with_password(url, "a/b") == with_it
    RedisAddress.parse(with_it, "core").connect()
