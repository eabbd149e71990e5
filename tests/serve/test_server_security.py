"""The whole server, as a process, against those that mean it ill."""

from __future__ import annotations

import contextlib
import io
import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg import ConfigError, Orla, cli
from orla_lg.errors import OrlaError
from tests.serve.fixtures import until
from tests.serve.processes import Served, serving, until_ready
from tests.stub_engine import Gate, Reply, StubEngine
from tests.timed import within

CALL = {"model": "light", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
WIRES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": CALL,
    "/v1/messages": CALL,
    "/v1/responses": {"model": "light", "input": "hello"},
    "/v1/completions": {"model": "light", "prompt": "hello"},
    "/v1/embeddings": {"model": "light", "input": "hello"},
}


class House:
    """A server with keys, and its engine."""

    def __init__(self, folder: Path, engine: StubEngine, served: Served) -> None:
        self.folder, self.engine, self.served = folder, engine, served
        self.keys: list[str] = []

    def key(self, *words: str) -> str:
        self.keys.append(self.command("create", f"key-{len(self.keys)}", *words))
        until(lambda: self.post(None, "/v1/none").status_code == 401)
        until(lambda: self.post(self.keys[-1], "/v1/none").status_code != 401)
        return self.keys[-1]

    def command(self, *words: str) -> str:
        """Run ``orla-lg keys`` in this process, which is another one than the server's."""
        with contextlib.redirect_stdout(io.StringIO()) as said:
            assert cli.main(["keys", *words, "--store", str(self.folder / "orla-lg" / "serve.db")]) == 0
        return said.getvalue().strip()

    def post(self, key: str | None, path: str = "/v1/chat/completions", **headers: str) -> httpx.Response:
        sent = headers if key is None else {"authorization": f"Bearer {key}", **headers}
        return httpx.post(self.served.url + path, json=WIRES.get(path, CALL), headers=sent, timeout=30.0)


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder = tmp_path_factory.mktemp("house")
    with StubEngine() as engine:
        (folder / "orla.toml").write_text(
            f'records_file = "records.jsonl"\n[backends.light]\nurl = "{engine.url}"\n'
            "cost = {input_per_mtoken = 1.0}\n"
            f'[backends.heavy]\nurl = "{engine.url}"\n[mapping]\n"*" = "light"\n'
            "[serve]\nlisten_address = '127.0.0.1:0'\n"
        )
        with serving(folder, ()) as served:
            until_ready(served)
            yield House(folder, engine, served)


@pytest.fixture(scope="module")
def acme(house: House) -> str:
    return house.key("--tenant", "acme")


@pytest.mark.parametrize("path", WIRES)
def test_without_a_key_or_with_a_wrong_one_each_wire_says_401_in_its_own_words(
    house: House, acme: str, path: str
) -> None:
    before = len(house.engine.requests)
    for key in (None, "orla-" + "a" * 52, acme + "a", "sk-anything"):
        answer = house.post(key, path)
        assert answer.status_code == 401 and answer.headers["www-authenticate"].startswith("Bearer")
        error = answer.json()["error"]
        assert error["type"] == "authentication_error" or error["code"], error
        assert (answer.json().get("type") == "error") == (path == "/v1/messages")
        assert key is None or key not in answer.text
    assert len(house.engine.requests) == before


def test_a_header_that_claims_another_tenant_is_refused_and_the_keys_own_is_recorded(house: House, acme: str) -> None:
    assert house.post(acme, **{"x-orla-tenant": "zenith"}).status_code == 403
    for headers in ({}, {"x-orla-tenant": "acme"}, {"x-orla-workflow-run": "w"}):
        assert house.post(acme, **headers).status_code == 200
    body = {**CALL, "metadata": {"orla.tenant": "zenith"}}
    sent = {"authorization": f"Bearer {acme}"}
    assert httpx.post(f"{house.served.url}/v1/chat/completions", json=body, headers=sent).status_code == 403
    written = house.folder / "records.jsonl"
    until(lambda: written.exists() and written.read_text().count('"backend": "') >= 3)  # by a thread of its own
    records = [json.loads(line) for line in written.read_text().splitlines()]
    assert {record["tenant"] for record in records if record.get("backend")} == {"acme"}


def test_a_key_reaches_its_stages_and_backends_alone(house: House) -> None:
    key = house.key("--backend", "heavy", "--stage", "draft")
    assert house.post(key, **{"x-orla-stage": "final"}).status_code == 403
    assert house.post(key).status_code == 403
    assert house.post(key, **{"x-orla-stage": "draft"}).status_code == 403  # the mapping has it on light


@pytest.mark.parametrize("limit", ["3 calls per 1h", "0.000006 usd"])
def test_calls_side_by_side_do_not_overspend(house: House, limit: str) -> None:
    key, gate = house.key("--limit", limit), Gate()
    house.engine.rule = lambda seen: Reply(gate=gate)
    before = len(house.engine.requests)
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(house.post, key) for _ in range(12)]
        until(lambda: sum(answer.done() for answer in answers) >= 9)
        gate.open()
        statuses = [answer.result().status_code for answer in answers]
    house.engine.rule = lambda seen: None
    assert set(statuses) == {200, 429} and statuses.count(200) <= 3
    assert len(house.engine.requests) - before == statuses.count(200)
    refused = house.post(key)
    assert refused.status_code == 429 and ("retry-after" in refused.headers) == ("per" in limit)
    assert "limits." in refused.json()["error"]["message"]


def test_so_many_calls_of_a_key_at_once(house: House) -> None:
    key, gate = house.key("--concurrency", "2"), Gate()
    house.engine.rule = lambda seen: Reply(gate=gate)
    with ThreadPoolExecutor(5) as pool:
        answers = [pool.submit(house.post, key) for _ in range(5)]
        until(lambda: sum(answer.done() for answer in answers) == 3)
        gate.open()
        results = [answer.result() for answer in answers]
    house.engine.rule = lambda seen: None
    assert sorted(answer.status_code for answer in results) == [200, 200, 429, 429, 429]
    assert {answer.headers["retry-after"] for answer in results if answer.status_code == 429} == {"1"}
    assert house.post(key).status_code == 200


def test_a_revoked_key_is_refused_within_a_second(house: House) -> None:
    def revoked_s() -> float:
        key = house.key()
        assert house.post(key).status_code == 200
        house.command("revoke", f"key-{len(house.keys) - 1}")
        begun_s = time.monotonic()
        until(lambda: house.post(key).status_code == 401)
        return time.monotonic() - begun_s

    within(1.0, revoked_s)


def test_control_needs_its_scope_and_json_and_no_other_site(house: House, acme: str) -> None:
    control = house.key("--scope", "control")
    assert house.post(acme, "/v1/orla/reload").status_code == 403
    assert house.post(control).status_code == 403
    url, sent = f"{house.served.url}/v1/orla/reload", {"authorization": f"Bearer {control}"}
    body = b'{"dry_run": true}'
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        assert httpx.post(url, content=body, headers={**sent, "content-type": kind}).status_code == 415
    json_ = {**sent, "content-type": "application/json"}
    assert httpx.post(url, content=body, headers={**json_, "origin": "http://evil.example"}).status_code == 403
    assert httpx.post(url, content=body, headers={**json_, "host": "evil.example"}).status_code == 421
    assert httpx.post(url, content=body, headers=json_).status_code == 200


@pytest.mark.parametrize("which", [None, "wrong", "use"])
def test_no_link_without_a_key_for_links(house: House, acme: str, which: str | None) -> None:
    key = {None: None, "wrong": "orla-" + "a" * 52, "use": acme}[which]
    with pytest.raises(OrlaError) as fault:
        Orla.remote(house.served.url, key=key, core_patience_s=1.0).close()
    assert isinstance(fault.value, ConfigError) and (key is None or key not in str(fault.value))


def test_no_key_is_in_what_the_server_writes(house: House, acme: str) -> None:
    assert len(house.keys) > 3
    state = house.folder / "orla-lg"
    files = [file for file in house.folder.rglob("*") if file.is_file()]
    assert {"serve.db", "records.jsonl"} <= {file.name for file in files} and state.stat().st_mode & 0o777 == 0o700
    for file in files:
        held = file.read_bytes()
        assert not [key for key in house.keys if key.encode() in held or key[5:].encode() in held], file
        assert file.parent != state or file.stat().st_mode & 0o777 == 0o600
