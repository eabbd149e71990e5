"""Workflows whose cache is kept whole: who may start, who is suspended, and that stock calls notice nothing."""

from __future__ import annotations

import pytest

from orla_lg.errors import ConfigError
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.ownership import Ownership
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Kind, SimRequest
from orla_lg_sim.residents import Residents


def filled(**workflows: int) -> tuple[Ownership, Residents]:
    """A pool of ten blocks in which workflows own so many, all free; each is resident, in this order."""
    kept, value = Ownership(10), 0
    for name, blocks in workflows.items():
        for block in kept.pool.take(blocks):
            value += 1
            kept.pool.name(block, value)
            kept.claim(name, value)
            kept.pool.give_back([block])
        kept.use(name)
    return kept, Residents(kept, spare_blocks=1)


def test_a_stranger_starts_only_beside_what_residents_have() -> None:
    _, residents = filled(a=4, b=3)
    assert residents.may_start("c", 2, (), running=True), "three are spare, one stays so"
    assert not residents.may_start("c", 3, (), running=True)
    assert residents.may_start("c", 3, (), running=False), "with nothing running somebody must go"
    assert residents.may_start("a", 9, (), running=True), "a resident is not held back"
    assert residents.may_start(None, 9, (), running=True), "nor is who has no workflow"


def test_what_a_stranger_finds_is_not_spare_for_it() -> None:
    kept, residents = filled(a=4, b=3)
    kept.release_workflow("b")
    theirs = kept.pool.find([5, 6, 7])
    assert len(theirs) == 3
    assert not residents.may_start("b", 3, theirs, running=True)
    assert residents.may_start("b", 2, theirs, running=True)


def test_who_was_used_longest_ago_gives_up_all() -> None:
    kept, residents = filled(a=3, b=3, c=3)
    kept.use("a")
    residents.starts("c", 2, kept.pool.find([7, 8, 9]), {None})
    assert list(kept.residents) == ["a", "c"] and residents.suspensions == 1
    taken = kept.pool.take(4)
    assert kept.alone("b") == [] and len(kept.alone("a")) == 3, "its blocks are taken first, and all of them"
    kept.pool.give_back(taken)
    kept.check_integrity()


def test_who_runs_is_not_suspended_and_who_is_over_is_no_resident() -> None:
    kept, residents = filled(a=3, b=3, c=3)
    residents.starts("c", 5, (), {"a", "b"})
    assert list(kept.residents) == ["a", "b", "c"] and not residents.suspensions
    kept.flush_workflow("a")
    kept.release_workflow("b")
    assert list(kept.residents) == ["c"] and "a" not in residents


def turns(parameters: EngineParameters, workflows: bool) -> int:
    """Three workflows of three calls each, in turn, in a pool for two of them; return the tokens found."""
    engine, found, now = SimEngine(parameters), 0, 0.0
    for call in range(3):
        for number in range(3):
            hashes = [1000 * number + block for block in range(6 + call)]
            name = f"w{number}" if workflows else None
            engine.submit(SimRequest(f"{number}/{call}", 4 * len(hashes) + 1, 1, hashes, workflow=name), now)
        while (at_s := engine.next_event_s()) is not None:
            now = at_s
            found += sum(event.cached_tokens for event in engine.advance(now) if event.kind is Kind.FINISHED)
            engine.check_integrity()
    return found


def test_of_three_that_do_not_fit_some_keep_all_instead_of_each_losing_all() -> None:
    small = {"block_tokens": 4, "kv_blocks": 20, "max_running": 1}
    stock, whole = EngineParameters(**small), EngineParameters(**small, keep_whole=0.1)
    assert turns(whole, workflows=True) > turns(stock, workflows=True)
    assert turns(whole, workflows=False) == turns(stock, workflows=False), "without workflows it is the stock engine"


def test_the_spare_part_is_a_part() -> None:
    with pytest.raises(ConfigError, match=r"keep_whole must be below 1, got 1\.0"):
        EngineParameters(keep_whole=1.0)
