"""``orla-lg check``: what it reads, what it says of engines that answer and of those that do not."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from orla_lg import cli
from tests.stub_engine import StubEngine


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("ORLA_CONFIG", "ORLA_URL", "ORLA_ENGINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def nobodys_url() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{sock.getsockname()[1]}/v1"


def test_it_says_what_it_read_and_what_each_backend_can(
    home: Path, engine: StubEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORLA_URL", "http://127.0.0.1:1/v1")
    dead = nobodys_url()
    (home / "orla.toml").write_text(f'[backends.main]\nurl = "{engine.url}"\n[backends.gone]\nurl = "{dead}"\n')
    assert cli.main(["check"]) == 1
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"configured by {home / 'orla.toml'}; ORLA_URL is set too, but a file goes first"
    assert lines[0] == f"ok    main: openai at {engine.url}"
    assert any(line.startswith(f"FAULT gone: openai at {dead}") for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.strip()}
    assert rows["main"] == ["gone"], "the matrix has a column for each, dead or alive"
    assert rows["json_schema"] == ["native", "?"] and rows["flush_workflow"] == ["unsupported", "?"]
    assert "flag and plugin would" in lines[-1]


def test_from_the_environment_and_for_machines(
    home: Path, engine: StubEngine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ORLA_URL", engine.url)
    assert cli.main(["check"]) == 0
    assert capsys.readouterr().out.startswith("configured by the environment\nok    default: ")
    assert cli.main(["check", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["ok"] and report["capabilities"]["tools"] == "native"


def test_what_cannot_be_read_is_status_2(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["check"]) == 2
    assert "no configuration" in capsys.readouterr().err
    (home / "orla.toml").write_text('[backends.main]\nurll = "x"\n')
    assert cli.main(["check"]) == 2
    assert "did you mean 'url'" in capsys.readouterr().err


def test_it_says_where_no_model_is_named_and_several_are_served(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with StubEngine(models=("bge-embed", "qwen3:8b")) as engine:
        (home / "orla.toml").write_text(
            f'[backends.any]\nurl = "{engine.url}"\n[backends.one]\nurl = "{engine.url}"\nmodel = "qwen3:8b"\n'
        )
        assert cli.main(["check"]) == 0
        assert capsys.readouterr().out.count("names no model and serves several: calls must name one of them") == 1
        assert cli.main(["check", "--json"]) == 0
        assert [len(report["notes"]) for report in json.loads(capsys.readouterr().out)] == [1, 0]


def test_it_says_whether_tenants_are_isolated_as_asked(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with StubEngine(slots=2) as slotted, StubEngine() as plain:
        tables = "".join(
            f'[backends.{name}]\nurl = "{stub.url}"\nengine = "{engine}"\nisolate_tenants = true\n'
            for name, stub, engine in (("apart", slotted, "llamacpp"), ("mixed", plain, "openai"))
        )
        (home / "orla.toml").write_text(tables)
        assert cli.main(["check"]) == 1
        said = capsys.readouterr().out
        assert cli.main(["check", "--json"]) == 1
        reports = {each["backend"]: each for each in json.loads(capsys.readouterr().out)}
    assert "ok    apart" in said and "isolates tenants: a slot's tokens are used for their own tenant" in said
    assert "FAULT mixed" in said and "cannot divide its cache" in said
    assert (reports["apart"]["isolates_tenants"], reports["mixed"]["isolates_tenants"]) == (True, False)
