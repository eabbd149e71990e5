"""Three engines and two pools; the servers that a test started end with it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.link.conftest import links
from tests.link.scripted import eventually
from tests.serve.pools.served import Pools
from tests.stub_engine import StubEngine


@pytest.fixture
def pools(tmp_path: Path, engine: StubEngine, other_engine: StubEngine) -> Iterator[Pools]:
    with StubEngine() as third:
        made = Pools(tmp_path / "orla.toml", {"small-a": engine, "small-b": other_engine, "big": third})
        made.say()
        try:
            yield made
        finally:
            made.end()
    eventually(lambda: not links())
