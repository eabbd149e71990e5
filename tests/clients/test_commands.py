"""``orla-lg clients``: what it prints of packages that are there, are not, or are there in another version."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from orla_lg import cli
from orla_lg.clients import commands
from orla_lg.clients.table import CLIENTS, PASSING, Client, Passing

POND = Client("pond-llm", "pond_llm", ("Pond.request", "AsyncPond.request"), "stainless", ("chat",), ("ChatPond",))
OPENAI = CLIENTS[0]


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that modules are imported from, whose packages are all taken for installed."""
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(commands, "version_of", lambda package: None if package == "gone-llm" else "1.2.3")
    return tmp_path


def test_it_says_what_is_served_and_what_is_not_installed(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    gone = replace(POND, package="gone-llm")
    passing = Passing("lake-llm", "ChatLake", "it speaks by pigeon", "use ChatPond")
    monkeypatch.setattr(commands, "clients", lambda: (gone, OPENAI))
    monkeypatch.setattr(commands, "PASSING", (passing,))
    assert cli.main(["clients"]) == 0
    served, head, first, *more, second, blank, passes, by = capsys.readouterr().out.splitlines()
    assert (served, blank, passes) == (commands.SERVED, "", commands.PASSES)
    assert head.split() == ["client", "version", "wires", "forms", "models"]
    assert first.split()[:3] == ["openai", "1.2.3", "chat,"] and "sync, async, streamed, raw  ChatOpenAI" in first
    assert more and max(map(len, [first, *more])) < 120, "what is long goes on in the next line"
    assert second.split()[:3] == ["gone-llm", "not", "installed"]
    assert by == "  lake-llm 1.2.3, ChatLake: it speaks by pigeon; use ChatPond"


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("class Pond:\n    def request(self): ...\n", "this version has no AsyncPond.request to take calls over at"),
        ("class Pond:\n    request = 3\n", "no Pond.request and no AsyncPond.request"),
        ("raise OSError('no licence')\n", "pond_{name} cannot be imported: OSError: no licence"),
    ],
    ids=["method", "methods", "import"],
)
def test_a_version_that_cannot_be_served_is_a_fault(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], code: str, fault: str,
    request: pytest.FixtureRequest,
) -> None:  # fmt: skip
    name = request.node.callspec.id
    (here / f"pond_{name}.py").write_text(code)
    monkeypatch.setattr(commands, "clients", lambda: (OPENAI, replace(POND, module=f"pond_{name}")))
    assert cli.main(["clients"]) == 1
    assert "  FAULT pond-llm: " in (said := capsys.readouterr().out) and fault.format(name=name) in said
    assert cli.main(["clients", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [row["served"] for row in found["served"]] == [True, False]
    assert fault.format(name=name) in found["served"][1]["fault"]


def test_for_machines(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["clients", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [row["client"] for row in found["served"]] == [client.package for client in CLIENTS]
    assert found["served"][0]["methods"] == ["OpenAI.request", "AsyncOpenAI.request"]
    assert [each["package"] for each in found["passing"]] == [each.package for each in PASSING]


def test_help_teaches(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["clients", "--help"])
    said = capsys.readouterr().out
    assert all(part in said for part in ("orla_lg.clients", "`messages`", "exit status", "orla-lg clients --json"))
