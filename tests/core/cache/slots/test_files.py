from __future__ import annotations

import pytest

from orla_lg.core.cache.slots.files import Saved, SavedPool, covered, instance_of
from orla_lg.core.memory.events import Doing


def size(entry: Saved) -> float:
    return float(entry.tokens)


def put(pool: SavedPool, owner: str, prefix: tuple[int, ...] = (1,), tokens: int = 5, now: float = 0.0) -> str | None:
    entry = pool.begin_writing(owner, prefix, tokens, Doing.TOOL, tokens, size)
    if entry is None:
        return None
    pool.written(entry, now, ok=True)
    pool.check_integrity()
    return entry.name


def test_a_workflow_that_goes_on_overwrites_its_own_file_and_a_branch_does_not() -> None:
    pool = SavedPool("e", 3)
    assert put(pool, "u", (1, 2)) == put(pool, "u", (1, 2, 3)) == "orla-e-0"
    assert put(pool, "u", (1, 9)) == "orla-e-1"
    assert put(pool, "v", (1, 2, 3, 4)) == "orla-e-2", "another workflow's is never its own"
    best = pool.find("u", lambda entry: entry.covers((1, 9, 9)))
    assert best is not None and best.name == "orla-e-1"


def test_when_names_run_out_the_least_worth_goes_or_the_newcomer_is_not_saved() -> None:
    pool = SavedPool("e", 2)
    put(pool, "u", tokens=5)
    put(pool, "v", tokens=7)
    assert put(pool, "w", tokens=4) is None
    assert put(pool, "w", tokens=6) == "orla-e-0" and pool.find("u", size) is None


def test_what_a_slot_holds_too_goes_first() -> None:
    pool = SavedPool("e", 2)
    put(pool, "u", tokens=9)
    put(pool, "v", tokens=5)
    entry = pool.find("u", size)
    assert entry is not None
    pool.begin_reading(entry)
    assert put(pool, "w", tokens=6) == "orla-e-1", "nothing is written where the engine reads"
    pool.read(entry, 0.0, ok=True)
    assert put(pool, "x", tokens=1) == "orla-e-0"


def test_flushed_while_it_is_written_or_read() -> None:
    pool = SavedPool("e", 1)
    entry = pool.begin_writing("u", (1,), 5, None, 5.0, size)
    assert entry is not None and pool.drop("u") == 1 and pool.begin_emptying() is None
    pool.written(entry, 0.0, ok=True)
    assert pool.find("u", size) is None
    name = pool.begin_emptying()
    assert name == "orla-e-0"
    pool.emptied(name, ok=False)
    assert pool.begin_emptying() == name, "it is tried again"
    pool.emptied(name, ok=True)
    assert pool.begin_emptying() is None


def test_the_old_is_forgotten_unless_it_is_used() -> None:
    pool = SavedPool("e", 2, max_age_s=10.0)
    put(pool, "u", now=0.0)
    put(pool, "v", now=0.0)
    entry = pool.find("v", size)
    assert entry is not None
    pool.begin_reading(entry)
    pool.read(entry, 8.0, ok=True)
    assert pool.expire(11.0) == 1 and pool.find("u", size) is None and pool.find("v", size) is entry


def test_other_weights_fit_nothing() -> None:
    pool = SavedPool("e", 2)
    pool.fits("m")
    put(pool, "u")
    pool.fits("m")
    assert len(pool) == 1
    pool.fits("n")
    assert len(pool) == 0


def test_names_are_the_same_tomorrow_and_fit_for_files() -> None:
    assert (
        instance_of("a/b c", "http://x:1/v1") == instance_of("a/b c", "http://x:1/v1") != instance_of("a", "http://x")
    )
    assert instance_of("a/b c", "http://x:1/v1").startswith("a_b_c-")


def test_what_covers_a_prompt_is_counted_by_messages() -> None:
    assert covered((1, 2, 3, 4), 100, (1, 2, 9)) == 50.0
    assert covered((), 100, (1,)) == covered((2,), 100, (1,)) == 0.0


@pytest.mark.parametrize("name", ["ü" * 100, "x" * 10_000, "\ud800", "a/../b", "nul\0", "模型"])
def test_names_are_such_that_any_file_system_takes_them(name: str) -> None:
    made = instance_of(name, "http://127.0.0.1:1/v1")
    assert made.isascii() and len(made) < 100 and not set(made) & set("/\\\0.")
    assert made == instance_of(name, "http://127.0.0.1:1/v1") != instance_of(f"{name}2", "http://127.0.0.1:1/v1")
    assert instance_of("heavy", "http://127.0.0.1:1/v1").startswith("heavy-"), "as ever"
