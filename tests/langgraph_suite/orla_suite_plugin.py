"""A pytest plugin for a library's own tests: wraps every graph that they make, and notes how each test ended.

It runs in the suite's environment, where the package ``tests`` is the library's, so nothing of ours but
``orla_lg`` may be imported. The environment says what to do:

    ORLA_SUITE_OUTCOMES   the file that gets one line of JSON for each test
    ORLA_SUITE_WRAP       "1": every graph is wrapped; else they stay bare
    ORLA_SUITE_TOOLS      "1": all tools of the wrapped graphs start early
    ORLA_SUITE_POSTGRES   a server's URL, ending in "/", for the parametrisations on PostgreSQL
    ORLA_SUITE_REDIS      "1": a Redis listens where the suite looks for it
    ORLA_SUITE_ONLY       a file with the names of the tests to run, one a line
"""

from __future__ import annotations

import gc
import json
import os
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import orla_suite_early as early
import pytest
from langgraph.func import entrypoint
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from orla_lg import Backend, Orla
from orla_lg.graph.tools.early.reasons import DropReason

MODEL = "stub"

_REDIS = re.compile(r"\[.*redis.*\]")
"""A test needs Redis if a parameter says so; PostgreSQL if a parameter or its file does."""


# ── every graph is wrapped ───────────────────────────────────────────────────────────────────────────


class _Models(BaseHTTPRequestHandler):
    """An engine that serves one model and is never asked for more: the suite's models are fakes.

    Few are not: their requests are recorded ones, and go where the code sends them, since no mapper says else.
    """

    def do_GET(self) -> None:
        body = json.dumps({"object": "list", "data": [{"id": MODEL, "object": "model"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None: ...


@contextmanager
def _orla() -> Iterator[Orla]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Models)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    try:
        with Orla([Backend("stub", url, model=MODEL)]) as orla:
            yield orla
    finally:
        server.shutdown()
        server.server_close()


def _wrap_what_is_made(patch: pytest.MonkeyPatch, orla: Orla) -> None:
    """Make ``StateGraph.compile``, ``@entrypoint`` and a test's own ``Pregel(…)`` give wrapped graphs."""
    compile_bare, entry_bare, init_bare = StateGraph.compile, entrypoint.__call__, Pregel.__init__
    splits = _tools_start_early()

    def compile_wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        return orla.wrap(compile_bare(self, *args, **kwargs), split_prompts=splits)

    def entry_wrapped(self: Any, func: Any) -> Any:
        return orla.wrap(entry_bare(self, func), split_prompts=splits)

    def init_wrapped(self: Any, *args: Any, **kwargs: Any) -> None:
        init_bare(self, *args, **kwargs)
        # LangGraph makes graphs in several steps; those are wrapped above, when they are whole.
        if type(self) is Pregel and str(sys._getframe(1).f_globals.get("__name__")).startswith("tests."):
            vars(self).update(vars(orla.wrap(self, split_prompts=splits)))

    patch.setattr(StateGraph, "compile", compile_wrapped)
    patch.setattr(entrypoint, "__call__", entry_wrapped)
    patch.setattr(Pregel, "__init__", init_wrapped)


def _tools_start_early() -> bool:
    return os.environ.get("ORLA_SUITE_TOOLS") == "1"


_session = ExitStack()
_orlas: list[Orla] = []
"""The one whose tools start early, if any."""


def pytest_sessionstart(session: pytest.Session) -> None:
    if postgres := os.environ.get("ORLA_SUITE_POSTGRES"):
        from tests import conftest_checkpointer, conftest_store  # type: ignore[attr-defined]

        # Before the test modules are imported, some of which copy the name.
        for module in (conftest_checkpointer, conftest_store):
            module.DEFAULT_POSTGRES_URI = postgres
    if os.environ.get("ORLA_SUITE_WRAP") == "1":
        orla = _session.enter_context(_orla())
        patch = _session.enter_context(pytest.MonkeyPatch.context())
        _wrap_what_is_made(patch, orla)
        if _tools_start_early():
            _orlas.append(orla)
            early.declare_all(patch)
            early.hear_fakes(patch, orla.core)


def pytest_sessionfinish(session: pytest.Session) -> None:
    for orla in _orlas:
        told = early.account(orla)
        if not early.wait_for_nothing(orla, 5.0, lambda now: now.in_threads > 0):
            told["still running in a thread"] = orla.statistics().early_tools.in_threads
        with Path(os.environ["ORLA_SUITE_OUTCOMES"]).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"early": told}) + "\n")
    _session.close()


@pytest.fixture(autouse=True)
def _no_tool_is_left() -> Iterator[None]:
    """A test ends with its runs, and a run with what was started early for it."""
    yield
    for orla in _orlas:
        if orla.core.early.is_idle:
            continue
        gc.collect()  # a stream that the test dropped
        if not early.wait_for_nothing(orla, 2.0, lambda now: now.waiting > 0):
            left = [start for starts in orla.core.early._runs.values() for start in starts]
            names = ", ".join(start.tool.name for start in left)
            orla.core.early.drop(left, DropReason.RUN_ENDED)
            pytest.fail(f"left of the tools that were started early: {names}")


# ── which tests ──────────────────────────────────────────────────────────────────────────────────────


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    only = os.environ.get("ORLA_SUITE_ONLY")
    names = set(Path(only).read_text(encoding="utf-8").splitlines()) if only else None
    left = [
        item for item in items if _needs_what_is_missing(item) or (names is not None and item.nodeid not in names)
    ]
    config.hook.pytest_deselected(items=left)
    gone = set(left)
    items[:] = [item for item in items if item not in gone]


def _needs_what_is_missing(item: pytest.Item) -> bool:
    if "remote_graph" in getattr(item, "fixturenames", ()):  # a LangGraph server's command line
        return True
    if not os.environ.get("ORLA_SUITE_POSTGRES") and "postgres" in item.nodeid:
        return True
    return not os.environ.get("ORLA_SUITE_REDIS") and _REDIS.search(item.nodeid) is not None


# ── how they ended ───────────────────────────────────────────────────────────────────────────────────


class _Outcomes:
    """Writes one line for each test, in the process that controls the others."""

    def __init__(self, path: str) -> None:
        self._file = Path(path).open("a", encoding="utf-8", buffering=1)  # noqa: SIM115 - open for the whole session
        self._told = False

    def collected(self, count: int) -> None:
        if not self._told:
            self._told = True
            self._write({"collected": count})

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        if session.items:
            self.collected(len(session.items))

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.collected(len(ids))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        # One report for a test that ended as it should; one more for each phase that did not.
        if report.when == "call" or not report.passed:
            crash = getattr(report.longrepr, "reprcrash", None)
            why = str(getattr(crash, "message", "") or (report.longrepr if report.failed else ""))
            self._write({"test": report.nodeid, "outcome": report.outcome, "why": why[-2000:]})

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")


def pytest_configure(config: pytest.Config) -> None:
    path = os.environ.get("ORLA_SUITE_OUTCOMES")
    if path and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Outcomes(path), "orla-suite-outcomes")
