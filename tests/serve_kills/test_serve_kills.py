"""Cores and replicas of real processes are killed and frozen: nothing is lost, nothing sent twice, the bound holds.

``make test-serve-kills`` makes over a hundred (half an hour, alone), ``make test-serve-kills KILLS=one`` one of each.
The control shows that the runs can tell: a core that does not wait for its roster has more calls at the engine than
the bound, with the same late replica.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random

import pytest

from tests.serve_kills import kinds
from tests.serve_kills.pool import BOUND, Pool, Row, shown

ALL = os.environ.get("ORLA_ALL_KILLS") == "1"
REPLICAS, CALLERS = (4, 6) if ALL else (3, 4)
CUT_OFF = "BackendUnavailable"
"""How a call ends whose replica was without a core for longer than its lease."""

pytestmark = [pytest.mark.kills, pytest.mark.timeout(3600 if ALL else 300)]


@pytest.fixture(scope="module")
def rows() -> Iterator[list[Row]]:
    made: list[Row] = []
    yield made
    print(f"\n\n{shown(made)}\n")


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    with Pool(tmp_path_factory.mktemp("pool"), REPLICAS, CALLERS) as made:
        yield made
        made.end()


@pytest.mark.parametrize("name", [*kinds.KINDS])
def test_nothing_is_lost_or_sent_twice_and_the_bound_holds(name: str, pool: Pool, rows: list[Row]) -> None:
    kind, times = kinds.KINDS[name]
    row = kind(pool, times if ALL else 1, Random(name))
    rows.append(row)
    print(f"\n{' | '.join(row.shown())}", flush=True)
    assert (row.lost, row.twice) == (0, 0), row
    assert 0 < row.most <= BOUND, row
    assert row.calls > 0
    if kind is kinds.replica_frozen_beyond_its_lease:
        assert set(row.errors) <= {CUT_OFF}, row
    else:
        assert not row.errors, row


def test_a_core_that_does_not_wait_for_its_roster_breaks_the_bound(pool: Pool, rows: list[Row]) -> None:
    row = kinds.without_waiting_for_the_roster(pool, 3 if ALL else 1, Random("control"))
    rows.append(row)
    assert row.most > BOUND, f"the control must fail, else the other runs prove nothing: {row}"
