"""``orla-lg top``, ``pause``, ``drain``, ``resume`` and ``set`` against a server, by its URL."""

from __future__ import annotations

import json
import socket
import threading
from pathlib import Path

import pytest

from orla_lg import cli
from orla_lg.core.boundary.plain import counted
from orla_lg.openai_api import home
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.store.store import MemoryStore
from tests.serve.in_thread import Running, server
from tests.serve.test_server import certificate, file, key, until

__all__ = ["certificate", "file"]


@pytest.fixture(autouse=True)
def _nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ORLA_SERVER", "ORLA_SERVER_KEY", "ORLA_CONTROL"):
        monkeypatch.delenv(name, raising=False)


def ready(running: Running) -> None:
    until(lambda: running.server.state is CoreState.READY)


def test_it_is_watched_and_steered(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(file) as running:
        ready(running)
        at = ("--server", running.url)
        assert cli.main(["top", "--once", "--json", *at]) == 0
        assert json.loads(capsys.readouterr().out)["backends"]["light"]["paused"] is False
        assert cli.main(["top", "--once", *at]) == 0
        assert "light" in capsys.readouterr().out
        assert cli.main(["pause", "light", *at]) == 0
        assert f"light is paused: {counted(0, 'call')} go on" in capsys.readouterr().out
        assert cli.main(["drain", "light", "--timeout", "1", *at]) == 0
        assert "light is drained" in capsys.readouterr().out
        assert running.orla.statistics().backends["light"].queue.paused
        assert cli.main(["resume", "light", *at]) == 0
        assert cli.main(["set", "limit", "light", "--max-concurrency", "3", *at]) == 0
        assert cli.main(["set", "policy", "--policy", "edf", "--backend", "light", *at]) == 0
        assert "stages go by edf" in capsys.readouterr().out
        assert running.orla.statistics().backends["light"].queue.max_concurrency == 3
        assert cli.main(["pause", "lihgt", *at]) == 1
        assert "did you mean 'light'" in capsys.readouterr().err


def test_a_watch_ends_with_the_server(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server(file) as running:
        ready(running)
        threading.Timer(0.3, running.end).start()
        assert cli.main(["top", "--json", "--interval", "0.1", "--server", running.url]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) >= 2 and "the process has ended" in said.err


def test_a_key_of_the_scope_is_needed(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = MemoryStore()
    view, control = key(store, KeyScope.VIEW), key(store, KeyScope.CONTROL)
    with server(file, store=store) as running:
        ready(running)
        at = ("--server", running.url)
        assert cli.main(["top", "--once", "--json", *at]) == 1
        assert cli.main(["top", "--once", "--json", *at, "--key", view]) == 0
        assert cli.main(["pause", "light", *at, "--key", view]) == 1
        assert "control" in capsys.readouterr().err
        monkeypatch.setenv("ORLA_SERVER", running.url)
        monkeypatch.setenv("ORLA_SERVER_KEY", control)
        assert cli.main(["pause", "light"]) == 0
        assert running.orla.statistics().backends["light"].queue.paused
        monkeypatch.setenv("ORLA_SERVER", "http://127.0.0.1:1")
        assert cli.main(["resume", "light", *at]) == 0, "a server on this machine gets the key too"
        assert control not in "".join(capsys.readouterr())


def test_by_tls_and_by_a_unix_socket(
    file: Path, certificate: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    path = tmp_path / "orla.sock"
    with server(file, address=f"unix:{path}") as running:
        ready(running)
        assert cli.main(["top", "--once", "--json", "--server", running.url]) == 0
    cert, private = certificate
    file.write_text(f'{file.read_text()}tls_cert = "{cert}"\ntls_key = "{private}"\n')
    home.certificates.cache_clear()
    with server(file) as running:
        ready(running)
        assert cli.main(["pause", "light", "--server", running.url]) == 1
        assert "certificate" in capsys.readouterr().err.lower()
        home.certificates.cache_clear()
        monkeypatch.setenv("SSL_CERT_FILE", str(cert))
        assert cli.main(["pause", "light", "--server", running.url]) == 0
    home.certificates.cache_clear()


def test_of_several_servers_the_one_that_serves_is_asked(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = MemoryStore()
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = f"http://127.0.0.1:{free.getsockname()[1]}"
    with server(file, store=store) as running:
        ready(running)
        with server(file, store=store) as standby:
            assert cli.main(["pause", "light", "--server", f"{gone},{standby.url},{running.url}"]) == 0
            assert running.orla.statistics().backends["light"].queue.paused
            assert cli.main(["pause", "light", "--server", standby.url]) == 1
            assert "standby" in capsys.readouterr().err
    assert cli.main(["pause", "light", "--server", gone]) == 1
    assert f"no server answers at {gone}" in capsys.readouterr().err


def test_a_socket_and_a_server_are_two_things(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["top", "--control", "x.sock", "--server", "http://127.0.0.1:1"])
    assert cli.main(["top", "--json", "--control", str(tmp_path / "x.sock"), "--key", "secret"]) == 1
    assert "a socket takes none" in capsys.readouterr().err
    monkeypatch.setenv("ORLA_SERVER", "http://127.0.0.1:1")
    monkeypatch.setenv("ORLA_CONTROL", str(tmp_path / "x.sock"))
    assert cli.main(["top", "--json"]) == 1
    assert "no running process at" in capsys.readouterr().err, "the process's own socket goes first"


def test_what_is_no_server_says_so(engine_url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["top", "--json", "--server", engine_url]) == 1
    assert capsys.readouterr().err.startswith("orla-lg: ")
    assert cli.main(["top", "--json", "--server", "ftp://x"]) == 1
    assert "is not http://HOST:PORT" in capsys.readouterr().err


@pytest.fixture
def engine_url(engine: object) -> str:
    return str(getattr(engine, "url", "")).removesuffix("/v1")
