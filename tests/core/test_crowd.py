"""Very many waiting calls are kept out of the collector's way, and given back to it."""

from __future__ import annotations

import gc

import pytest

from orla_lg.core import crowd
from tests.core.test_desk import a_desk, enter, leave


def test_a_crowd_is_frozen_as_it_comes_and_thawed_when_it_is_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(crowd, "MANY", 100)
    monkeypatch.setattr(crowd, "AT_ONCE", 50)
    told: list[str] = []
    monkeypatch.setattr(gc, "freeze", lambda: told.append("freeze"))
    monkeypatch.setattr(gc, "unfreeze", lambda: told.append("unfreeze"))
    desk, _ = a_desk(max_concurrency=1)
    inside = [enter(desk) for _ in range(1 + 99)]
    assert told == [], "not yet a crowd"
    inside += [enter(desk) for _ in range(51)]
    assert told == ["freeze", "freeze"]
    for _ in range(100):  # as many come as go: what waits is new all the same
        leave(desk, inside.pop(0))
        inside.append(enter(desk))
    assert told == ["freeze"] * 4
    while len(inside) > 51:
        leave(desk, inside.pop(0))
    assert told == ["freeze"] * 4, "half of them wait on"
    for queued in inside:
        leave(desk, queued)
    assert told == [*["freeze"] * 4, "unfreeze"]


def test_what_was_frozen_is_collected_again_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crowd, "AT_ONCE", 1)
    before = gc.get_freeze_count()
    each = crowd.Crowd()
    each.grew(crowd.MANY)
    assert gc.get_freeze_count() > before
    each.shrank(crowd.MANY // 2 - 1)
    assert gc.get_freeze_count() == 0
