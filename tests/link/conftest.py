"""What the link's tests share: a scripted core with one backend, and replicas that must leave nothing behind."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from orla_lg import Orla
from orla_lg.link import calls
from tests.conftest import BACKEND_KEY, at
from tests.link.scripted import ScriptedCore, eventually
from tests.stub_engine import StubEngine

ENGINE_KEY = "TEST_ENGINE_KEY"


@pytest.fixture
def core(engine: StubEngine, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedCore]:
    monkeypatch.setenv(ENGINE_KEY, BACKEND_KEY)
    with ScriptedCore(at(engine, api_key=None), key_env=ENGINE_KEY) as running:
        yield running


def links() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "orla-link"]


@pytest.fixture(autouse=True)
def _engines_let_go_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LETS_GO_S", 0.1)


@pytest.fixture
def replica(core: ScriptedCore) -> Iterator[Callable[..., Orla]]:
    """Return a maker of replicas of the scripted core; none may leave a call, a run or a thread."""
    made: list[Orla] = []

    def make(url: str | None = None, **settings: Any) -> Orla:
        made.append(Orla.remote(url or core.url, **settings))
        return made[-1]

    yield make
    try:
        for orla in made:
            serving: Any = orla.core.serving
            eventually(lambda serving=serving: not len(serving.calls))
            assert not serving.book.open_runs() and not serving.progress._open
            serving.check_integrity()
    finally:
        for orla in made:
            orla.close()
    eventually(lambda: not links())
