"""Real engines for tests. Those marked ``engines`` run only when asked for: ``pytest -m engines``."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from orla_lg.engines import EngineOptions, OwnEngine, running_engine

KV_TOKENS = 16_384


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "engines" in config.option.markexpr:
        return
    left = [item for item in items if item.get_closest_marker("engines")]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if not item.get_closest_marker("engines")]


def lent(options: EngineOptions) -> Iterator[OwnEngine]:
    with running_engine(options) as engine:
        yield engine


@pytest.fixture(scope="session")
def _shared_vllm(request: pytest.FixtureRequest) -> Iterator[OwnEngine]:
    yield from lent(EngineOptions("vllm-cpu", kv_tokens=KV_TOKENS))


@pytest.fixture(scope="session")
def _shared_llamacpp() -> Iterator[OwnEngine]:
    yield from lent(EngineOptions("llamacpp", slots=2, kv_tokens=4096))


def running(engine: OwnEngine) -> OwnEngine:
    """Start the engine again if the last test ended it."""
    if engine.running is None:
        engine.restart()
    return engine


@pytest.fixture
def real_vllm(_shared_vllm: OwnEngine) -> OwnEngine:
    """vLLM with a KV cache of 16,384 tokens; a test may kill and restart it."""
    return running(_shared_vllm)


@pytest.fixture
def real_llamacpp(_shared_llamacpp: OwnEngine) -> OwnEngine:
    """llama.cpp with two slots of 2,048 tokens; a test may kill and restart it."""
    return running(_shared_llamacpp)
