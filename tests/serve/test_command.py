"""``orla-lg serve`` and ``orla-lg reload`` as a user runs them."""

from __future__ import annotations

import re
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from orla_lg import cli
from orla_lg.core.engine.given import NoBackends
from orla_lg.orla import Orla
from orla_lg.serve import starting
from orla_lg.serve.announcement import announcement
from orla_lg.serve.parts import ServerParts
from orla_lg.serve.settings import settings
from tests.serve.in_thread import server
from tests.serve.processes import Served, serving, until_ready
from tests.stub_engine import Gate, Reply, StubEngine

CALL = {"model": "light", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}


def configured(folder: Path, engine: StubEngine, *, top: str = "", backend: str = "", serve: str = "") -> Path:
    file = folder / "orla.toml"
    file.write_text(
        f'{top}\n[backends.light]\nurl = "{engine.url}"\n{backend}\n[mapping]\n"*" = "light"\n'
        f"[serve]\nlisten_address = '127.0.0.1:0'\n{serve}\n"
    )
    return file


def post(served: Served, path: str = "/v1/chat/completions", body: dict[str, Any] = CALL) -> httpx.Response:
    return httpx.post(f"{served.url}{path}", json=body, timeout=30.0)


def test_without_a_configuration_it_is_healthy_and_says_what_to_do(tmp_path: Path) -> None:
    with serving(tmp_path, ORLA_URL="http://127.0.0.1:9/v1") as served:
        said = "\n".join(served.said)
        assert "--demo" in said and "--config" in said and "127.0.0.1:9" not in said
        until_ready(served)
        for path in ("/healthz", "/readyz", "/api/v1/health"):
            answer = httpx.get(served.url + path)
            assert answer.is_success and answer.headers["x-orla-server"]
        refused = post(served)
        assert refused.status_code in (400, 404) and "light" in refused.json()["error"]["message"]
        served.signal(signal.SIGINT)
        assert served.wait() == 0


def test_it_prints_what_it_found_drains_and_is_reloaded(
    tmp_path: Path, engine: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    file = configured(tmp_path, engine, top='policy = "fair"')
    gate = Gate()
    with serving(tmp_path, ()) as served:
        said = "\n".join(served.said)
        assert f"light  {engine.url}  openai  stub-model" in said and str(file) in said
        assert "policy: fair" in said and "keys: none" in said
        until_ready(served)
        assert post(served).json()["choices"]
        # A dry run changes nothing, a wrong file neither.
        reloads = ["reload", "--server", served.url]
        configured(tmp_path, engine, top='policy = "edf"', backend="max_concurrency = 3")
        changes = "  backends.light.max_concurrency: none becomes 3\n  policy: 'fair' becomes 'edf'\n"
        for _ in range(2):
            assert cli.main([*reloads, "--dry-run"]) == 0
            assert capsys.readouterr().out == f"would change:\n{changes}"
        served.signal(signal.SIGHUP)
        served.until("was loaded again:\n" + changes)
        # Nor does a dry run say yes to what is refused then.
        good = file.read_text()
        unknown = good.replace('"*" =', 'x = "gone"\n"*" ='), "gone"
        for wrong, text in (unknown, (f'memory = "release_only"\n{good}', "memory")):
            file.write_text(wrong)
            for words in (reloads, [*reloads, "--dry-run"]):
                assert cli.main(words) == 1
                said = capsys.readouterr()
                assert text in said.err and not said.out
        assert "would change nothing; these need a restart" in said.err
        file.write_text(good.replace("edf", "eddf"))
        assert cli.main(reloads) == 1
        said = capsys.readouterr().err
        assert "orla.toml: policy: " in said and "did you mean 'edf'" in said
        served.signal(signal.SIGHUP)
        served.until("the configuration was not loaded again")
        # Draining: what is under way ends, what comes is refused.
        engine.rule = lambda seen: Reply(gate=gate)
        answers: list[httpx.Response] = []
        calling = threading.Thread(target=lambda: answers.append(post(served)))
        with httpx.Client() as kept:
            kept.get(served.url + "/healthz")
            calling.start()
            engine.wait(lambda seen: seen.in_flight == 1)
            served.signal(signal.SIGTERM)
            served.until("ending: 1 call under way")
            refused = [kept.post(served.url + path, json=CALL) for path in ("/v1/chat/completions", "/v1/messages")]
            assert [each.status_code for each in refused] == [503, 503] and refused[0].headers["retry-after"] == "1"
            assert refused[0].json()["error"]["type"] == "server_error" and refused[1].json()["type"] == "error"
            assert kept.get(served.url + "/healthz").is_success and not served.is_ready()
        gate.open()
        calling.join(20.0)
        assert answers[0].json()["choices"] and served.wait() == 0
        assert served.errors.endswith("ended: 2 calls served\n")


def test_a_second_signal_ends_it_at_once(tmp_path: Path, engine: StubEngine) -> None:
    configured(tmp_path, engine)
    engine.rule = lambda seen: Reply(before_s=30.0)
    faults: list[object] = []

    def call() -> None:
        try:
            faults.append(post(served).status_code)
        except httpx.HTTPError as error:
            faults.append(error)

    with serving(tmp_path, ()) as served:
        until_ready(served)
        calling = threading.Thread(target=call)
        calling.start()
        engine.wait(lambda seen: seen.in_flight == 1)
        served.signal(signal.SIGTERM)
        served.until("ending: 1 call under way")
        served.signal(signal.SIGTERM)
        assert served.wait() == 1
        assert re.search(r"ended: \d calls? served, 1 call cut off\n", served.errors)
        calling.join(20.0)
        assert faults and faults != [200]
        assert "Traceback" not in served.errors, served.errors
    engine.wait(lambda seen: seen.in_flight == 0)


# What is refused before it listens; in this process, since nothing is begun


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["serve", *words]) == 1
    said = capsys.readouterr()
    assert not said.out and said.err.startswith("orla-lg: ")
    return said.err


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


WRONG = {
    "[serve]\nlisten_address = 'x'": r"serve\.listen_address must be HOST:PORT",
    "[serve]\nlisten_adress = 'x'": r"serve\.listen_adress: unknown key; did you mean 'listen_address'",
    "[serve]\ncore_lease_s = 0": r"serve\.core_lease_s: found 0",
    "[serve]\ncore_lease_s = 20": r"serve\.core_lease_s: found 20; at most replica_lease_s, 10",
    "[serve]\ntls_cert = 'a.pem'": r"serve: tls_cert and tls_key belong together",
    "[serve]\ntls_cert = 'a.pem'\ntls_key = 'b.pem'": r"serve\.tls_cert: .*a\.pem with .*b\.pem is no certificate",
    "[serve]\nmax_body_bytes = -1": r"serve\.max_body_bytes: found -1",
    "[serve.gateway]\nsession_idle_s = 0": r"serve\.gateway\.session_idle_s: found 0",
    "[serve.gateway]\nsession_headrs = []": r"serve\.gateway\.session_headrs: unknown key; did you mean",
    "[serve]\nlisten_address = '0.0.0.0:0'": r"serve\.listen_address: 0\.0\.0\.0:0 is reached .* orla-lg keys create",
    "[serve]\nlisten_address = ':80'": r"serve\.listen_address: ':80' has no host; 0\.0\.0\.0:80 is every address",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named_with_file_and_key(text: str, here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (here / "orla.toml").write_text(text)
    assert re.search(rf"orla\.toml: {WRONG[text]}", refused(capsys).replace("`", " "), re.S)


def test_a_port_that_is_taken_is_named(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert f"port {port} is taken" in refused(capsys, "--port", str(port))


def test_a_server_of_ours_is_no_backend(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server() as served:
        (here / "orla.toml").write_text(f'[backends.light]\nurl = "{served.url}/v1"\n')
        assert "backend 'light'" in (said := refused(capsys, "--port", "0", "--store", str(here / "s" / "x.db")))
        assert "answers an orla_lg server, which is no engine" in said


def test_without_the_extra_it_says_how_to_get_it(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(starting, "EXTRA", ("no_such_package_of_any_kind",))
    assert "pip install 'orla-lg[serve]'" in refused(capsys)


def test_demo_and_a_configuration_are_two_things(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--demo" in refused(capsys, "--demo", "--config", "orla.toml")


def test_an_empty_server_is_none(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    (here / "orla.toml").write_text(f'[serve]\nlisten_address = "127.0.0.1:{port}"\n')
    for words in ((), ("--server", "")):
        monkeypatch.setenv("ORLA_SERVER", "")
        assert cli.main(["reload", *words]) == 1
        assert f"no server answers at http://127.0.0.1:{port}" in capsys.readouterr().err


def _parts(orla: Orla) -> ServerParts:
    none: Any = None
    return ServerParts(none, none, orla, {}, keys=0, posted=0)


def test_the_demo_says_what_holds_for_it(here: Path) -> None:
    chosen = settings(None, reads_file=False)
    with Orla(NoBackends.YET) as orla:
        parts = _parts(orla)
        store: Any = SimpleNamespace(place="/s/serve.db")
        cases = (parts, True), (parts, False), (parts._replace(posted=2), False), (parts._replace(store=store), False)
        demo, other, posted, kept = (
            "\n".join(announcement(chosen, each, "http://127.0.0.1:8081", is_demo=is_demo)) for each, is_demo in cases
        )
    assert "the demo takes none" in demo and "keys create" not in demo and "keys create" in other
    assert "store: /s/serve.db" in kept and "store:" not in demo
    assert "no engine is behind it" in other and "no engine" not in posted and "  2 backends posted by API" in posted
    for said in (demo, other):
        assert "Orla.remote('http://127.0.0.1:8081')" in said


def test_a_core_says_which_pool_it_has(here: Path) -> None:
    chosen = settings(None, pool="fast", reads_file=False)
    with Orla(NoBackends.YET) as orla:
        said = "\n".join(announcement(chosen, _parts(orla), "http://127.0.0.1:8081", is_demo=False))
    assert "it is the core of pool fast, which has all backends of this configuration" in said


def test_an_option_that_is_none_is_told_by_its_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words, told in (
        (["serve", "--stanby"], "orla-lg serve: error: unrecognized arguments: --stanby; did you mean '--standby'?"),
        (
            ["keys", "create", "x", "--tennant=a"],
            "orla-lg keys create: error: unrecognized arguments: --tennant=a; did ",
        ),
        (["keys", "list", "more"], "orla-lg keys list: error: unrecognized arguments: more\n"),
    ):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_reload_says_where_it_looked(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert cli.main(["reload", "--server", f"http://127.0.0.1:{port}"]) == 1
    assert f"no server answers at http://127.0.0.1:{port}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("url", "server", "goes"),
    [
        ("http://other:1", None, False), ("http://other:1", "http://core:1", False),
        ("http://core:2", "http://core:1", False), ("http://core:1", "http://core:1", True),
        ("https://core:1", "http://core:1", False), ("http://127.0.0.1:1", None, True),
        ("http://localhost.other:1", None, False), ("http://[::1]:1", None, True),
        ("http://core:1", "http://core:1,http://spare:1", True), (None, "http://core:1", True), (None, None, True),
        ("unix:/run/orla.sock", None, True), ("http://localhost:1", "http://core:1", True),
    ],
)  # fmt: skip
def test_the_key_in_the_environment_goes_to_its_own_server_only(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, url: str | None,
    server: str | None, goes: bool,
) -> None:  # fmt: skip
    sent: list[dict[str, str]] = []
    words = () if url is None else ("--server", url)

    def request(self: httpx.Client, *args: object, headers: dict[str, str], **more: object) -> httpx.Response:
        sent.append({name: value for name, value in headers.items() if name == "authorization"})
        return httpx.Response(401, json={"error": {"message": "a key is needed"}})

    monkeypatch.setattr(httpx.Client, "request", request)
    monkeypatch.setenv("ORLA_SERVER_KEY", "orla-secret")
    if server is None:
        monkeypatch.delenv("ORLA_SERVER", raising=False)
    else:
        monkeypatch.setenv("ORLA_SERVER", server)
    assert cli.main(["reload", *words]) == 1
    told = capsys.readouterr().err
    assert sent == [{"authorization": "Bearer orla-secret"} if goes else {}]
    assert ("ORLA_SERVER_KEY was not sent" in told) is not goes and "orla-secret" not in told
    assert cli.main(["reload", *words, "--key", "given"]) == 1
    assert sent[1] == {"authorization": "Bearer given"} and "was not sent" not in capsys.readouterr().err
