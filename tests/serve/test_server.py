"""The server's parts together: links, keys, standbys, other addresses, and a configuration that replicas follow."""

from __future__ import annotations

import asyncio
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from pathlib import Path

import httpx
import pytest

from orla_lg import Backend, BackendUnavailable, ConfigError, Orla, cli, config
from orla_lg.config_tables import GatewayTable, ServeTable
from orla_lg.link.messages import PATH
from orla_lg.serve.access.keys import AccessKey, KeyScope, create
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.server import gateway_settings
from orla_lg.serve.settings import ListenAddress, ServeSettings, settings
from orla_lg.serve.store.store import MemoryStore
from tests.serve.in_thread import PATIENCE_S, server
from tests.serve.replica import graph_of
from tests.stub_engine import Gate, Reply, StubEngine

CALL = {"model": "light", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
UPGRADE = {"connection": "upgrade", "upgrade": "orla-link"}


def until(condition: Callable[[], object]) -> None:
    until_s = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.01)


@pytest.fixture
def file(tmp_path: Path, engine: StubEngine) -> Path:
    made = tmp_path / "orla.toml"
    made.write_text(f'[backends.light]\nurl = "{engine.url}"\n[mapping]\n"*" = "light"\n[serve]\ncore_lease_s = 4\n')
    return made


def key(store: MemoryStore, *scopes: KeyScope) -> str:
    _, secret = create(store, lambda key_id, sha256: AccessKey(key_id, "test", sha256, tuple(scopes)))
    return secret


def test_a_link_needs_a_key_of_its_scope(file: Path) -> None:
    store = MemoryStore()
    use, link = key(store, KeyScope.USE), key(store, KeyScope.LINK)
    with server(file, store=store) as running:
        until(lambda: running.server.state is CoreState.READY)
        for headers, status in (({}, 401), ({"authorization": f"Bearer {use}"}, 403), ({"x-api-key": "wrong"}, 401)):
            answer = httpx.get(running.url + PATH, headers={**UPGRADE, **headers})
            assert answer.status_code == status and answer.headers["x-orla-server"]
            assert use not in answer.text
        with pytest.raises((ConfigError, BackendUnavailable)):
            Orla.remote(running.url, key=use)
        with Orla.remote(running.url, key=link) as orla:
            assert list(orla.statistics().backends) == ["light"]
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CALL).status_code == 401
        allowed = {"authorization": f"Bearer {use}"}
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CALL, headers=allowed).is_success
        reload = httpx.post(f"{running.url}/v1/orla/reload", json={"dry_run": True}, headers=allowed)
        assert reload.status_code == 403
        control = {"authorization": f"Bearer {key(store, KeyScope.CONTROL)}"}
        reload = httpx.post(f"{running.url}/v1/orla/reload", json={"dry_run": True}, headers=control)
        assert reload.json() == {"ok": True, "dry_run": True, "changes": "  nothing"}


def test_it_shows_its_state_and_is_steered(file: Path) -> None:
    store = MemoryStore()
    view, control = key(store, KeyScope.VIEW), key(store, KeyScope.CONTROL)
    with server(file, store=store) as running, httpx.Client(base_url=f"{running.url}/v1/orla") as http:
        until(lambda: running.server.state is CoreState.READY)
        seeing, steering = {"authorization": f"Bearer {view}"}, {"authorization": f"Bearer {control}"}
        assert http.get("/state").status_code == 401
        pause = {"do": "pause", "backend": "light"}
        assert http.post("/control", json=pause, headers=seeing).status_code == 403
        assert http.post("/control", json={"do": "pause", "backend": "light"}, headers=steering).json() == {
            "ok": True
        }
        shown = http.get("/state", headers=seeing).json()["state"]["backends"]["light"]
        assert shown["paused"] and shown["waiting"] == 0
        for asked, fault in (
            ({"do": "pause", "backend": "lihgt"}, "did you mean 'light'"),
            ({"do": "prioritize", "run": "none", "priority": 3}, "no run 'none'"),
            ({"do": "nothing"}, "no such request"),
        ):
            answer = http.post("/control", json=asked, headers=steering)
            assert answer.status_code == 409 and fault in answer.json()["error"]


def test_a_configuration_of_no_file_is_served(engine: StubEngine) -> None:
    core = config.Settings((Backend("light", engine.url),), {"*": "light"})  # as --demo and ORLA_URL have it
    with server(core=core) as running:
        until(lambda: running.server.state is CoreState.READY)
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CALL).is_success
        posted = {"name": "light", "endpoint": "http://127.0.0.1:9/v1", "model_id": "m", "max_concurrency": 1}
        assert (found := httpx.post(f"{running.url}/api/v1/backends", json=posted)).status_code == 409, found.text
        other = {**posted, "name": "other"}
        assert httpx.post(f"{running.url}/api/v1/backends", json=other).status_code == 201
        assert list(running.orla.statistics().backends) == ["light", "other"]


def test_what_asks_for_a_link_the_wrong_way_is_answered(file: Path) -> None:
    with server(file) as running:
        assert httpx.get(running.url + PATH).status_code == 426
        assert httpx.get(running.url + "/healthz", headers=UPGRADE).is_success
        assert httpx.get(running.url + "/healthz", headers={"connection": "upgrade", "upgrade": "h2c"}).is_success
        for body in ("no json", "[]", '{"dry": true}', '{"dry_run": 1}'):
            headers = {"content-type": "application/json"}
            assert httpx.post(f"{running.url}/v1/orla/reload", content=body, headers=headers).status_code == 400
        assert httpx.post(f"{running.url}/v1/orla/reload", content="{}").status_code == 415
        assert httpx.get(f"{running.url}/healthz", headers={"host": "evil.example"}).is_success
        assert httpx.get(f"{running.url}/v1/models", headers={"host": "evil.example"}).status_code == 421


def test_of_two_cores_on_one_store_one_decides_and_the_other_follows(file: Path) -> None:
    store = MemoryStore()
    with server(file, store=store) as first:
        until(lambda: first.server.state is CoreState.READY)
        with server(file, store=store) as second:
            assert httpx.get(second.url + "/healthz").is_success
            assert httpx.get(second.url + "/readyz").json()["state"] == "standby"
            refused = httpx.post(f"{second.url}/v1/chat/completions", json=CALL)
            assert refused.status_code == 503 and refused.headers["retry-after"] and "standby" in refused.text
            assert httpx.get(second.url + PATH, headers=UPGRADE).status_code == 503
            assert httpx.post(f"{first.url}/v1/chat/completions", json=CALL).is_success
            first.end()
            first.join()
            assert first.status == 0
            until(lambda: second.server.state is CoreState.READY)
            assert httpx.post(f"{second.url}/v1/chat/completions", json=CALL).is_success
            assert second.server.lease.epoch == 2


def test_calls_of_a_link_outlive_the_core(file: Path, engine: StubEngine) -> None:
    """As in a rolling restart: those at the engine go on, those that wait are the standby's, and the bound holds."""
    store, gate = MemoryStore(), Gate()
    engine.rule = lambda seen: Reply(gate=gate)
    file.write_text(file.read_text().replace("[mapping]", "max_concurrency = 2\n[mapping]"))
    with server(file, store=store) as first, server(file, store=store) as second:
        until(lambda: CoreState.READY in (first.server.state, second.server.state))
        old, new = (first, second) if first.server.state is CoreState.READY else (second, first)
        with Orla.remote(f"{first.url},{second.url}") as orla, ThreadPoolExecutor(6) as pool:
            graph = graph_of(orla, "light")
            calls = [pool.submit(asyncio.run, graph.ainvoke({"messages": [("user", f"{n}")]})) for n in range(6)]
            engine.wait(lambda seen: seen.in_flight == 2)
            until(lambda: orla.statistics().backends["light"].queue.waiting == 4)
            old.end()
            old.join()
            until(lambda: new.server.state is CoreState.READY)
            until(lambda: orla.statistics().backends["light"].queue.waiting == 4)
            assert orla.statistics().backends["light"].queue.in_flight == 2 == engine.in_flight
            gate.open()
            assert all(call.result()["messages"] for call in calls)
        assert engine.peak == 2 and len(engine.chats) == 6


def test_draining_ends_in_time(file: Path, engine: StubEngine) -> None:
    engine.rule = lambda seen: Reply(before_s=60.0)
    file.write_text(f"{file.read_text()}drain_s = 0.2\n")
    with server(file) as running, ThreadPoolExecutor(1) as pool:
        until(lambda: running.server.state is CoreState.READY)
        call = pool.submit(httpx.post, f"{running.url}/v1/chat/completions", json=CALL, timeout=PATIENCE_S)
        engine.wait(lambda seen: seen.in_flight == 1)
        running.end()
        running.join()
        assert running.status == 0
        assert isinstance(call.exception(), httpx.HTTPError) or call.result().status_code >= 500
    engine.wait(lambda seen: seen.in_flight == 0)


def test_one_that_was_replaced_ends(file: Path) -> None:
    """As after it was frozen: another core has taken the lease meanwhile."""
    store = MemoryStore()
    file.write_text(file.read_text().replace("core_lease_s = 4", "core_lease_s = 0.6"))
    with server(file, store=store) as running:
        until(lambda: running.server.state is CoreState.READY)
        frozen = threading.Thread(target=running.call, args=(time.sleep, 1.0))
        frozen.start()
        until(lambda: store.lease("core", "another", 30.0))
        frozen.join()
        running.join()
        assert running.status == 1


def test_replicas_follow_a_configuration_that_is_loaded_again(file: Path, other_engine: StubEngine) -> None:
    with server(file) as running:
        until(lambda: running.server.state is CoreState.READY)
        with Orla.remote(running.url) as orla:
            text = file.read_text()
            file.write_text(f'[backends.heavy]\nurl = "{other_engine.url}"\n{text}')
            assert "backend 'heavy' is added" in running.call(lambda: running.server.reload(dry_run=False))
            until(lambda: "heavy" in orla.statistics().backends)
            file.write_text(text)
            running.call(lambda: running.server.reload(dry_run=False))
            until(lambda: "heavy" not in orla.statistics().backends)


def test_it_listens_on_a_unix_socket(file: Path, tmp_path: Path) -> None:
    path = tmp_path / "orla.sock"
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(str(path))
    stale.close()
    with server(file, address=f"unix:{path}") as running:
        assert running.url == f"unix:{path}" and path.stat().st_mode & 0o777 == 0o600
        until(lambda: running.server.state is CoreState.READY)
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path))) as client:
            assert client.post("http://localhost/v1/chat/completions", json=CALL).is_success
        with Orla.remote(running.url) as orla:
            assert list(orla.statistics().backends) == ["light"]
        assert cli.main(["reload", "--dry-run", "--server", running.url]) == 0
        with pytest.raises(ConfigError, match="another program listens there"), server(address=f"unix:{path}"):
            pass
    assert not path.exists()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("tls")
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost",
             "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", "key.pem",
             "-out", "cert.pem"]  # fmt: skip
    try:
        subprocess.run(words, cwd=folder, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    return folder / "cert.pem", folder / "key.pem"


def test_it_speaks_tls(file: Path, certificate: tuple[Path, Path]) -> None:
    cert, private = certificate
    file.write_text(f'{file.read_text()}tls_cert = "{cert}"\ntls_key = "{private}"\n')
    settings(str(file)).check(has_keys=False)
    with server(file) as running:
        assert running.url.startswith("https://127.0.0.1:")
        until(lambda: running.server.state is CoreState.READY)
        trusting = ssl.create_default_context(cafile=str(cert))
        assert httpx.post(f"{running.url}/v1/chat/completions", json=CALL, verify=trusting).is_success


# Where it listens, and what may not go together

ADDRESSES = {
    "127.0.0.1:8081": ("127.0.0.1", 8081, True), "[::1]:0": ("::1", 0, True), "localhost:1": ("localhost", 1, True),
    "0.0.0.0:8081": ("0.0.0.0", 8081, False), "10.0.0.5:65535": ("10.0.0.5", 65535, False),
    "[::]:1": ("::", 1, False), "host.example:9": ("host.example", 9, False), "127.9.9.9:1": ("127.9.9.9", 1, True),
}  # fmt: skip


@pytest.mark.parametrize("said", ADDRESSES)
def test_an_address_is_read(said: str) -> None:
    address = ListenAddress.parse("x", said)
    assert (address.host, address.port, address.is_local) == ADDRESSES[said] and str(address) == said


@pytest.mark.parametrize("said", ["", "8081", ":8081", "host", "host:", "host:x", "host:-1", "host:65536", "::1:80",
                                  "host :1", "unix:", "host:1\n", "http://h:1"])  # fmt: skip
def test_what_is_no_address_is_refused(said: str) -> None:
    with pytest.raises(ConfigError, match="listen_address"):
        ListenAddress.parse("listen_address", said)


def test_a_fault_is_where_it_was_said(tmp_path: Path) -> None:
    file = tmp_path / "orla.toml"
    file.write_text('[serve]\nstore = "serve.db"\nadvertise = ["http://core:8081"]\n')
    said, told = settings(str(file)), settings(str(file), store="redis://127.0.0.1:1/0", port=0)
    assert (said.where("store"), told.where("store")) == (f"{file}: serve.store", "--store")
    assert (told.where("listen_address"), told.where("drain_s")) == ("--listen-address", f"{file}: serve.drain_s")
    with pytest.raises(ConfigError, match=r"^--advertise: "):
        settings(str(file), advertise=["core:8081"])


@pytest.mark.parametrize("said", ["redis:/127.0.0.1:6379", "http://127.0.0.1:6379", "rediss:/store/0"])
def test_a_url_of_no_store_is_no_file(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"^--store: .*it is a URL"):
        settings(None, store=said, reads_file=False)


def listens(address: str, **table: object) -> ServeSettings:
    made = settings(None, address, reads_file=False)
    return ServeSettings(made.core, made.listen, ServeTable.model_validate(table))


def test_beyond_this_machine_it_needs_keys_and_a_cipher() -> None:
    listens("127.0.0.1:0").check(has_keys=False)
    with pytest.raises(ConfigError, match="there is no key yet: `orla-lg keys create`"):
        listens("0.0.0.0:0", behind_proxy=True).check(has_keys=False)
    with pytest.raises(ConfigError, match=r"in plain text: give \[serve\] tls_cert and tls_key, or behind_proxy"):
        listens("10.0.0.5:0").check(has_keys=True)
    listens("0.0.0.0:0", behind_proxy=True).check(has_keys=True)


def test_the_table_of_the_gateway_has_its_settings() -> None:
    assert set(GatewayTable.model_fields) == {each.name for each in fields(GatewaySettings)}
    assert gateway_settings(listens("127.0.0.1:0")) == GatewaySettings()
