"""``orla-lg check`` with a server: which configuration won, and whether the link and the engines answer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from orla_lg.cli import main
from tests.link.scripted import ScriptedCore
from tests.stub_engine import StubEngine


@pytest.fixture(autouse=True)
def _elsewhere(core: ScriptedCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORLA_SERVER", core.url)


def check(*arguments: str) -> int:
    try:
        return main(["check", *arguments])
    except SystemExit as ended:
        return int(ended.code or 0)


def test_the_link_is_checked(core: ScriptedCore, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "orla.toml").write_text('[backends.light]\nurl = "http://127.0.0.1:9/v1"\n')
    core.epoch, core.replicas = 3, 2
    assert check() == 0
    out = capsys.readouterr().out
    assert out.startswith("configured by ORLA_SERVER; ") and "orla.toml is there too" in out
    assert f"ok    the link to {core.url}: orla_lg 9.9, epoch 3, 2 replicas with this one" in out
    assert "ok    main: openai at" in out and "light" not in out


def test_as_json(core: ScriptedCore, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert told["server"]["epoch"] == 1 and [each["backend"] for each in told["backends"]] == ["main"]


def test_an_engine_that_is_not_reached_from_here(
    core: ScriptedCore, engine: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    engine.refuse()
    assert check("--timeout", "2") == 1
    assert "it is not reached from here" in capsys.readouterr().out


def test_no_server(core: ScriptedCore, capsys: pytest.CaptureFixture[str]) -> None:
    core.answer = b"HTTP/1.1 404 Not Found\r\n\r\n"
    assert check() == 2
    assert "is no orla_lg server" in capsys.readouterr().err
