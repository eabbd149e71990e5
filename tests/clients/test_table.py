"""The table of clients: its rows are right for the packages installed here, and other packages' rows are checked."""

from __future__ import annotations

import importlib
import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import EntryPoint
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest

from orla_lg.clients import table
from orla_lg.clients.commands import version_of
from orla_lg.clients.table import CLIENTS, ENTRY_POINTS, PASSING, Client, by_module, clients
from orla_lg.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
POND = Client("pond-llm", "pond_llm", ("Pond.request", "AsyncPond.request"), "stainless", ("chat",), ("ChatPond",))

HERE = [client for client in CLIENTS if version_of(client.package)]
installed = pytest.mark.parametrize("client", HERE, ids=[client.package for client in HERE])


@installed
def test_each_method_is_there_and_of_its_kind(client: Client) -> None:
    module = importlib.import_module(client.module)
    for method in client.methods:
        found = attrgetter(method)(module)
        assert inspect.iscoroutinefunction(found) == method.startswith("Async"), method
        if client.kind == "stainless":
            assert {"cast_to", "options", "stream", "stream_cls"} <= set(inspect.signature(found).parameters)


def test_looking_for_clients_imports_none_of_them() -> None:
    names = {client.module for client in CLIENTS} - {"openai"}  # which is a dependency of ours
    code = f"import orla_lg.clients.table as t, sys; t.clients(); print({names} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "set()", done.stderr


def test_rows_by_the_module_that_is_waited_for() -> None:
    beside = replace(POND, package="pond-more", methods=("Brook.send",), kind="plain")
    alone = replace(POND, package="langchain-pond", methods=())
    assert by_module([POND, beside, alone]) == {"pond_llm": (POND, beside)}


@pytest.mark.parametrize(
    ("client", "forms"),
    [
        (POND, ("sync", "async", "streamed", "raw")),
        (replace(POND, methods=("Pond.send",), kind="plain"), ("sync", "streamed")),
        (replace(POND, methods=("v2.AsyncPond.send",), kind="plain"), ("async", "streamed")),
        (replace(POND, methods=(), kind="plain"), ("sync", "async", "streamed")),
    ],
    ids=["both", "sync", "async", "by LangChain"],
)
def test_forms_follow_from_the_methods(client: Client, forms: tuple[str, ...]) -> None:
    assert client.forms == forms


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"package": ""}, "package must be a text"),
        ({"module": "pond-llm"}, "client 'pond-llm': module must be the name of a module, got 'pond-llm'"),
        ({"module": "pond..llm"}, "module must be the name"),
        ({"methods": "Pond.request"}, "methods must be a list"),
        ({"methods": ("request",)}, "of the form 'Class.method', got 'request'"),
        ({"methods": ("Pond.request",) * 33}, "methods must be at most 32, got 33"),
        ({"kind": "speakeasy"}, "kind must be 'stainless' or 'plain', got 'speakeasy'"),
        ({"wires": ()}, "wires must name at least one"),
        ({"wires": ("chat", 3)}, "wires: each of them must be a text"),
        ({"models": None}, "models must be a list"),
    ],
    ids=lambda each: next(iter(each)) if isinstance(each, dict) else "",
)
def test_a_wrong_row_says_what_would_be_right(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        replace(POND, **wrong)


# Rows of other packages

ROWS = {"pond": POND, "groq": replace(POND, package="groq"), "text": "no client", "none": None}


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return what registers entry points, as if their packages were installed."""
    (tmp_path / "pond_rows.py").write_text("from tests.clients.test_table import ROWS\nglobals().update(ROWS)\n")
    (tmp_path / "pond_broken.py").write_text("raise SystemError('no licence')\n")
    monkeypatch.syspath_prepend(str(tmp_path))

    def register(**values: str) -> None:
        entries = [EntryPoint(name, value, ENTRY_POINTS) for name, value in values.items()]
        monkeypatch.setattr(table, "entry_points", lambda group: entries if group == ENTRY_POINTS else [])

    return register


def test_a_row_of_another_package_is_added(registered: Callable[..., None]) -> None:
    registered(pond="pond_rows:pond")
    assert clients() == (*CLIENTS, POND)


def test_a_row_for_a_package_of_ours_takes_its_place(registered: Callable[..., None]) -> None:
    registered(groq="pond_rows:groq")
    rows = {client.package: client for client in clients()}
    assert len(rows) == len(CLIENTS) and rows["groq"].module == "pond_llm"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("pond_rows:text", "must name a Client of orla_lg.clients.table, got 'no client'"),
        ("pond_rows:none", "must name a Client"),
        ("pond_rows:nowhere", "cannot be loaded: AttributeError"),
        ("pond_missing:row", "cannot be loaded: ModuleNotFoundError: No module named 'pond_missing'"),
        ("pond_broken:row", "cannot be loaded: SystemError: no licence"),
    ],
)
def test_a_wrong_one_is_warned_of_and_left_out(
    registered: Callable[..., None], caplog: pytest.LogCaptureFixture, value: str, message: str
) -> None:
    registered(bad=value, pond="pond_rows:pond")
    with caplog.at_level(logging.WARNING, "orla_lg"):
        assert clients() == (*CLIENTS, POND)
    assert f"entry point 'bad' ({value})" in caplog.text and message in caplog.text


# The page


def cells(heading: str) -> list[list[str]]:
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split("|") for line in part.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in row] for row in rows]


def named(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def test_the_page_has_each_row_as_it_is() -> None:
    shown = {named(row[0])[0]: row for row in cells("What is served") if len(row) == 4 and row[0] != "client"}
    assert list(shown) == [client.package for client in CLIENTS]
    for client in CLIENTS:
        _, models, forms, wires = shown[client.package]
        assert named(wires) == client.wires and named(models) == client.models
        assert tuple(forms.split(", "))[: len(client.forms)] == client.forms


def test_the_page_has_what_passes_by() -> None:
    assert [named(row[0])[0] for row in cells("What passes by")[1:]] == [each.package for each in PASSING]
