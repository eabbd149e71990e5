"""Ray's token: asked for, made where a cluster is started, and missed at a cluster without one. Ray is not run."""

from __future__ import annotations

import contextlib
import importlib
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from orla_lg.errors import ConfigError
from orla_lg.serve.ray import authentication
from orla_lg.serve.ray.authentication import MODE, QUESTION, TOKEN, TOKEN_PATH, check_closed, switch_on


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (MODE, TOKEN, TOKEN_PATH):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_it_cannot_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MODE, "disabled")
    with pytest.raises(ConfigError, match=r"RAY_AUTH_MODE is 'disabled'.*set RAY_AUTH_MODE=token"):
        switch_on(may_make=True)


@pytest.mark.parametrize("may_make", [False, True])
def test_a_token_that_is_there_is_used(may_make: bool, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usual = home / ".ray" / "auth_token"
    usual.parent.mkdir()
    usual.write_text("a token")
    assert switch_on(may_make=may_make) == usual and os.environ[MODE] == "token"
    named = home / "named"
    named.write_text("another one")
    monkeypatch.setenv(TOKEN_PATH, str(named))
    assert switch_on(may_make=may_make) == named
    monkeypatch.setenv(TOKEN, "a third one")
    assert switch_on(may_make=may_make) is None


def test_a_cluster_that_is_started_gets_one_of_its_own(home: Path) -> None:
    file = switch_on(may_make=True)
    assert file is not None and file.is_relative_to(home / "state") and os.environ[TOKEN_PATH] == str(file)
    assert len(made := file.read_text()) == 64 and file.stat().st_mode & 0o077 == 0
    del os.environ[TOKEN_PATH]
    assert switch_on(may_make=True) == file and file.read_text() == made


def test_to_join_needs_the_clusters(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"neither RAY_AUTH_TOKEN nor .*auth_token has one"):
        switch_on(may_make=False)
    monkeypatch.setenv(TOKEN_PATH, str(home / "missing"))
    for may_make in (False, True):
        with pytest.raises(ConfigError, match="missing, which has none"):
            switch_on(may_make=may_make)


@contextlib.contextmanager
def head(*, is_open: bool) -> Iterator[str]:
    """Run what answers as a head does, with authentication or without."""
    pytest.importorskip("grpc", reason="gRPC comes with orla-lg[ray]")
    grpc: Any = importlib.import_module("grpc")

    def answer(_request: bytes, context: Any) -> bytes:
        if not is_open:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "no token")
        return b""

    service, _, method = QUESTION.removeprefix("/").partition("/")
    handler = grpc.unary_unary_rpc_method_handler(answer)
    server = grpc.server(ThreadPoolExecutor(1))
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, {method: handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait(5)


def test_a_cluster_without_authentication_is_refused() -> None:
    with (
        head(is_open=True) as address,
        pytest.raises(ConfigError, match=r"answers without a token.*RAY_AUTH_MODE=tok"),
    ):
        check_closed(address)


def test_one_with_authentication_is_not() -> None:
    with head(is_open=False) as address:
        check_closed(address)


def test_nothing_there_is_said() -> None:
    pytest.importorskip("grpc", reason="gRPC comes with orla-lg[ray]")
    with pytest.raises(ConfigError, match=r"no head of a Ray cluster answers at 127.0.0.1:9 \(UNAVAILABLE\)"):
        check_closed("127.0.0.1:9")


def test_commands_that_begin_at_once_have_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray of the first one reads its file at any time after."""
    made = iter(("first", "second"))

    def slowly(_: int) -> str:
        token = next(made)
        time.sleep(0.2 if token == "first" else 0.4)
        return token

    monkeypatch.setattr(authentication.secrets, "token_hex", slowly)
    with ThreadPoolExecutor(2) as both:
        files = list(both.map(lambda _: switch_on(may_make=True), range(2)))
    assert files[0] is not None and files[0] == files[1] and files[0].read_text() == "first"
