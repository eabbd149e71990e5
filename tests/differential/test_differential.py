"""Never worse than bare, on whatever a server answers."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings

from tests.differential.bench import Bench, running_bench
from tests.differential.script import Case
from tests.differential.strategies import cases

EXAMPLES = int(os.environ.get("ORLA_DIFFERENTIAL_EXAMPLES", "150"))


@pytest.fixture(scope="module")
def bench() -> Iterator[Bench]:
    threads = threading.active_count()
    with running_bench() as running:
        yield running
    assert threading.active_count() <= threads + 1


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(case=cases())
def test_a_wrapped_graph_is_never_worse_than_the_bare_one(bench: Bench, case: Case) -> None:
    verdict = bench.examine(case)
    assert not verdict.faults, verdict
