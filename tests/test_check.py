"""``orla-lg check``: what it reads, what it says of engines that answer and of those that do not."""

from __future__ import annotations

import json
import re
import secrets
import socket
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from orla_lg import cli
from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings
from tests.conftest import at
from tests.openai_api.raw_engine import USAGE, RawEngine, either, events, whole
from tests.stub_engine import StubEngine
from tests.wire.ollama_server import OllamaServer
from tests.wire.sglang_server import SGLangServer
from tests.wire.vllm_server import VLLMFlags, VLLMServer


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
    assert lines[-1] == "?                  the engine does not answer"


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


# Which engine answers


SERVERS: dict[str, Callable[[], Any]] = {"vllm": VLLMServer, "sglang": SGLangServer, "ollama": OllamaServer}


@pytest.mark.parametrize("served", SERVERS)
def test_an_engine_behind_anothers_name_is_found(home: Path, served: str, capsys: pytest.CaptureFixture[str]) -> None:
    with SERVERS[served]() as server:
        names = [*SERVERS, "llamacpp", "openai"]
        tables = [f'[backends.as_{name}]\nurl = "{server.url}"\nengine = "{name}"\n' for name in names]
        (home / "orla.toml").write_text("".join(tables))
        assert cli.main(["check", "--json"]) == 1
        reports = {each["backend"]: each for each in json.loads(capsys.readouterr().out)}
    for name in names:
        report = reports[f"as_{name}"]
        said = [*report["faults"], *report["notes"]]
        assert report["engine_found"] == served
        right = [line for line in said if f'engine = "{served}"' in line]
        assert len(right) == (name != served), (name, said)
        assert report["ok"] is (name in (served, "openai")), (name, said)
        if name not in (served, "openai"):
            assert right[0].startswith(f'engine = "{name}", but ')


@pytest.mark.engine
def test_llamacpp_is_found_behind_vllms_name(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with EmbeddedEngine(EngineSettings(slots=1, context_tokens=256, threads=1)) as engine:
        tables = [f'[backends.{name}]\nurl = "{engine.url}"\nengine = "{name}"\n' for name in ("vllm", "llamacpp")]
        (home / "orla.toml").write_text("".join(tables))
        assert cli.main(["check"]) == 1
    said = capsys.readouterr().out
    assert 'engine = "vllm", but llama.cpp answers there; engine = "llamacpp" is right' in said
    assert "ok    llamacpp" in said and ", 1 slot, 256 tokens of context\n" in said, "its version is not known"


# Which stages there are

APP = """
from langgraph.graph import START, MessagesState, StateGraph

def node(state): return {}

def inner():
    return StateGraph(MessagesState).add_node("draft", node).add_edge(START, "draft").compile()

def made():
    builder = StateGraph(MessagesState).add_node("classify", node).add_node("write", inner())
    return builder.add_edge(START, "classify").add_edge("classify", "write")

graph = made()
other = StateGraph(MessagesState).add_node("solo", node).add_edge(START, "solo").compile()
answer = 42
"""

NAMING = """
[backends.main]
url = "http://127.0.0.1:9/v1"
[mapping]
{name} = "main"
"*" = "main"
[request_policy]
classify = "sjf"
[limits.stages]
draft = {{ calls = 3 }}
"""


@pytest.fixture
def app(home: Path) -> Iterator[str]:
    """The module of an application, in the current folder."""
    name = f"app_{secrets.token_hex(4)}"
    (home / f"{name}.py").write_text(APP)
    before = list(sys.path)
    yield name
    sys.path[:] = before
    sys.modules.pop(name, None)


def test_a_misspelt_stage_is_found_in_a_graph(home: Path, app: str, capsys: pytest.CaptureFixture[str]) -> None:
    for table, wrong in (("mapping", "clasify"), ("request_policy", "clasify"), ("limits", "drafft")):
        text = NAMING.format(name="classify")
        right = {"clasify": "classify", "drafft": "draft"}[wrong]
        head, found, tail = text.partition(f"[{table}")
        (home / "orla.toml").write_text(head + found + tail.replace(right, wrong, 1))
        assert cli.main(["check", "--graph", f"{app}:graph"]) == 2
        said = capsys.readouterr().err
        assert f"names stage '{wrong}', which {app}:graph does not have; did you mean '{right}'" in said, said


@pytest.mark.parametrize("named", ["{app}:graph", "{app}.py:made", "./{app}.py:graph"])
def test_stages_that_are_there_are_said_to_be(
    home: Path, app: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "orla.toml").write_text(NAMING.format(name='"write|draft"'))
    named = named.format(app=app)
    assert cli.main(["check", "--timeout", "0.2", "--graph", named]) == 1, "nothing answers there"
    assert f"stages: all that are named (write|draft, classify, draft) are in {named}" in capsys.readouterr().out
    assert cli.main(["check", "--timeout", "0.2"]) == 1
    assert "`orla-lg check --graph MODULE:NAME` says whether a graph has them" in capsys.readouterr().out


def test_what_a_nodes_code_may_hold_is_taken_on_trust_as_wrap_does(
    home: Path, app: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "orla.toml").write_text(NAMING.format(name='"classify|model"'))
    assert cli.main(["check", "--timeout", "0.2", "--graph", f"{app}:graph"]) == 1, "nothing answers there"
    assert "stages: all that are named" in capsys.readouterr().out


def test_several_graphs_have_the_stages_together(home: Path, app: str, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "orla.toml").write_text(NAMING.format(name="solo"))
    assert cli.main(["check", "--graph", f"{app}:graph"]) == 2
    assert cli.main(["check", "--timeout", "0.2", "--graph", f"{app}:graph", "--graph", f"{app}:other"]) == 1
    assert f"are in {app}:graph and {app}:other" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("named", "said"),
    [
        ("{app}", "expected MODULE:NAME, as app:graph for `graph` in app.py"),
        ("{app}:grph", "has no 'grph'; did you mean 'graph'. known: graph, other"),
        ("{app}:answer", "expected a StateGraph or a compiled LangGraph graph, got int"),
        ("nowhere_at_all:graph", "nowhere_at_all cannot be imported from"),
        ("broken:graph", "broken failed when imported from .*ZeroDivisionError: division by zero"),
    ],
)
def test_what_is_no_graph_is_answered(
    home: Path, app: str, named: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "broken.py").write_text("1 / 0\n")
    (home / "orla.toml").write_text(NAMING.format(name="classify"))
    assert cli.main(["check", "--graph", named.format(app=app)]) == 2
    assert re.search(f"graph '{named.format(app=app)}': .*{said}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("policies", "said"),
    [
        ('stage_policy = "priority"', "leaves the calls of one stage to the default, workflow_fcfs"),
        (
            'request_policy = "edf"',
            'leaves stages to the default, workflow_fcfs, which reads no hints; policy = "edf"',
        ),
        ('policy = "priority"', ""),
        ('stage_policy = "priority"\nrequest_policy = "sjf"', ""),
        ('stage_policy = "las"', ""),
        ("", ""),
    ],
)
def test_a_policy_for_half_of_the_queues_is_pointed_out(
    home: Path, engine: StubEngine, policies: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (home / "orla.toml").write_text(f'{policies}\n[backends.main]\nurl = "{engine.url}"\n')
    assert cli.main(["check"]) == 0
    shown = capsys.readouterr().out
    assert said in shown if said else "policies:" not in shown


def test_the_legend_says_where_the_lines_are_that_it_speaks_of(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with VLLMServer(VLLMFlags(dev_mode=False)) as server:
        (home / "orla.toml").write_text(f'[backends.main]\nurl = "{server.url}"\nengine = "vllm"\n')
        assert cli.main(["check"]) == 0
    said = capsys.readouterr().out
    assert "to gain more:" in said and 'the lines under "to gain more" say' in said
    assert "advised above" not in said


def test_one_llama_cpp_under_two_names_is_pointed_out(engine: StubEngine, make_orla: Any, caplog: Any) -> None:
    make_orla(at(engine, "light", engine="llamacpp"), at(engine, "heavy", engine="llamacpp"))
    assert "backends 'light', 'heavy' are one llama.cpp" in caplog.text
    caplog.clear()
    make_orla(at(engine, "light"), at(engine, "heavy"))
    assert "one llama.cpp" not in caplog.text


def test_it_compares_answers_in_one_piece_and_streamed_if_asked(
    home: Path, engine: StubEngine, capsys: pytest.CaptureFixture[str]
) -> None:
    drops = either(whole({"role": "assistant", "content": "sunny"}), events([{"content": "sun"}], usage=USAGE))
    with RawEngine(drops) as other:
        (home / "orla.toml").write_text(
            f'[backends.same]\nurl = "{engine.url}"\n[backends.other]\nurl = "{other.url}"\n'
            f'[backends.off]\nurl = "{engine.url}"\nearly_tools = false\n'
            f'[backends.never]\nurl = "{engine.url}"\nassemble = false\n'
        )
        assert cli.main(["check", "--early-tools"]) == 0
        said = capsys.readouterr().out
        asked = len(other.asked)
        assert cli.main(["check", "--json"]) == 0
        assert len(other.asked) == asked == 2, "nothing is asked where that is not asked for"
    same, other_said, off, never = re.findall("early tools: (.*)", said)
    assert same.startswith("its answers are the same when they are streamed")
    assert "choices[0].message.content is 'sunny' in one piece, 'sun' streamed" in other_said
    assert (off, never) == ("no tool starts early", "answers in one piece are not streamed for them")
    reports = {report["backend"]: report for report in json.loads(capsys.readouterr().out)}
    assert (reports["off"]["early_tools"], reports["never"]["assemble"]) == (False, False)
    assert reports["same"]["streams_differ"] is None


def test_policies_and_labels_that_mean_nothing_are_pointed_out(
    home: Path, engine: StubEngine, app: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"""
        [backends.heavy]
        url = "{engine.url}"
        [[policies]]
        name = "no pii"
        subjects = ["backend:hevy", "backend:h*", "team:a"]
        resources = ["data:pii"]
        action = "deny"
        [stages.clasify]
        labels = ["pii"]
    """
    (home / "orla.toml").write_text(textwrap.dedent(text))
    assert cli.main(["check"]) == 0
    said = capsys.readouterr().out
    wrong = "'no pii' says 'backend:hevy', which is no backend of this configuration (external, heavy)"
    assert f"policies: {wrong}" in said and "backend:h*" not in said and "stages: clasify are named" in said
    assert cli.main(["check", "--graph", f"{app}:graph"]) == 2
    assert "did you mean 'classify'" in capsys.readouterr().err
