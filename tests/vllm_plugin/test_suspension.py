"""The rule of suspension on plain state: who goes, who is held, who makes room."""

from __future__ import annotations

from collections.abc import Hashable, Set
from dataclasses import dataclass, field

import pytest

from orla_lg_vllm.suspension import (
    IDLE_S,
    PATIENCE_S,
    PATIENCE_VARIABLE,
    SUSPEND_VARIABLE,
    Asking,
    Lack,
    PlannedStep,
    Suspension,
    SuspensionSettings,
    settings_of,
)

POOL = 100
"""So that the reserve is 10."""


@dataclass
class Pool:
    """A pool of which workflows hold parts that they share with nobody."""

    has: dict[str, int] = field(default_factory=dict)
    suspended: set[str] = field(default_factory=set)
    ordered: set[str] = field(default_factory=set)
    running: int = 0
    """Blocks in use."""
    looked_up: int = 0

    def free_blocks(self) -> int:
        return POOL - self.running

    def spare_blocks(self) -> int:
        return self.free_blocks() - sum(n for each, n in self.has.items() if each not in self.suspended)

    def knows(self, workflow: str) -> bool:
        return workflow in self.has

    def is_kept(self, workflow: str) -> bool:
        return workflow in self.ordered

    def suspend(self, workflow: str, *, pins: bool) -> None:
        self.suspended.add(workflow)

    def resume(self, workflow: str) -> None:
        self.suspended.discard(workflow)


@dataclass
class Engine:
    """A rule, its pool, and what waits."""

    pool: Pool = field(default_factory=Pool)
    now_s: float = 100.0
    runs: bool = True
    seats: int = 9
    growth: int = 0
    waiting: list[Asking] = field(default_factory=list)
    wanted: int = 0
    """Blocks that all who ever waited need."""
    rule: Suspension = field(init=False)

    def __post_init__(self) -> None:
        self.rule = Suspension(self.pool, POOL, SuspensionSettings())

    def rests(self, workflow: str, blocks: int, keep_s: float | None = None) -> None:
        """Let a workflow have had a call that left *blocks*."""
        self.rule.begins(f"past {workflow}", workflow)
        self.pool.has[workflow] = blocks
        self.rule.ends(f"past {workflow}", workflow, self.now_s, keep_s)

    def waits(self, workflow: str, lack: int, kept: int = 0, since_s: float = 0.0) -> None:
        def look(coming: Set[Hashable]) -> Lack:
            self.pool.looked_up += 1
            return Lack(lack, kept)

        name = f"{workflow or 'nobody'}{len(self.waiting)}"
        self.wanted += lack + kept
        self.waiting.append(Asking(name, workflow, (), self.now_s - since_s, look))

    def held(self) -> list[str]:
        """Return who is held back at the next step."""
        if self.rule.all_fits(self.growth + self.wanted):
            return []
        step = PlannedStep(self.now_s, self.waiting, self.seats, self.growth, self.runs)
        found = self.rule.plan(step)
        self.rule.check_integrity()
        return sorted(found)


@pytest.fixture
def engine() -> Engine:
    return Engine()


def test_where_all_fits_nobody_is_looked_at(engine: Engine) -> None:
    engine.rests("a", 30)
    engine.waits("b", 30)
    engine.waits("c", 30)
    assert engine.held() == [] and engine.pool.looked_up == 0
    engine.waits("d", 1)  # one block more than the reserve allows
    assert engine.held() == ["d2"] and engine.pool.looked_up == 3


def test_a_new_workflow_waits_until_it_fits_and_leaves_the_reserve(engine: Engine) -> None:
    engine.rests("a", 60)
    engine.waits("new", 31)
    assert engine.held() == ["new0"] and engine.rule.statistics()["held_requests"] == 1
    engine.pool.has["a"] = 59
    assert engine.held() == []
    assert "a" in engine.rule.residents, "nobody was suspended for it"


def test_none_passes_a_new_workflow_but_residents_and_who_has_no_workflow(engine: Engine) -> None:
    engine.rests("a", 60)
    engine.waits("large", 50)
    engine.waits("small", 1)
    engine.waits("a", 5, kept=60)
    engine.waits("", 5)
    assert engine.held() == ["large0", "small1"]


def test_a_resident_takes_all_of_the_one_idle_for_longest(engine: Engine) -> None:
    for name in ("a", "b", "c"):
        engine.rests(name, 30)
    engine.waits("a", 20, kept=30)
    assert engine.held() == []
    assert engine.rule.suspended == {"b"} == engine.pool.suspended
    assert engine.rule.statistics()["suspensions"] == 1
    assert engine.pool.spare_blocks() == 40


def test_who_runs_is_not_suspended_and_of_those_who_wait_the_last_one_is_first(engine: Engine) -> None:
    for name in ("a", "b", "c", "d"):
        engine.rests(name, 24)
    engine.rule.begins("more of b", "b")
    for name in ("a", "c", "d"):
        engine.waits(name, 10, kept=24)
    assert engine.held() == ["d2"]
    assert engine.rule.suspended == {"d"} and list(engine.rule.residents) == ["a", "c", "b"]


def test_nobody_makes_room_for_who_does_not_fit_beside_what_runs(engine: Engine) -> None:
    engine.pool.running = 50
    engine.rests("a", 20)
    engine.rests("b", 20)
    engine.waits("a", 40, kept=20)
    assert engine.held() == [] and engine.rule.suspended == set()


def test_room_is_made_for_what_runs_and_grows(engine: Engine) -> None:
    engine.rests("a", 50)
    engine.rests("b", 49)
    engine.growth = 2
    assert engine.held() == [] and engine.rule.suspended == {"a"}


def test_where_nothing_runs_the_first_goes_and_only_it(engine: Engine) -> None:
    engine.rests("a", 60)
    engine.waits("b", 60)
    engine.waits("c", 60)
    engine.runs = False
    assert engine.held() == ["c1"]
    assert engine.rule.suspended == {"a"}


def test_who_waited_for_too_long_goes_as_a_resident(engine: Engine) -> None:
    engine.rests("a", 95)
    engine.waits("b", 50, since_s=PATIENCE_S - 0.1)
    assert engine.held() == ["b0"]
    engine.now_s += 0.1
    engine.rests("a", 95)
    assert engine.held() == [] and engine.rule.suspended == {"a"}


def test_without_seats_nothing_is_looked_up_and_nobody_loses_anything(engine: Engine) -> None:
    engine.rests("a", 95)
    engine.seats = 0
    engine.waits("b", 50, since_s=PATIENCE_S)
    engine.waits("a", 50, kept=45)
    assert engine.held() == ["b0"]
    assert engine.pool.looked_up == 0 and engine.rule.suspended == set()


def test_a_suspended_workflow_is_resident_again_once_it_runs(engine: Engine) -> None:
    engine.rests("a", 50)
    engine.rests("b", 45)
    engine.waits("b", 10, kept=45)
    engine.held()
    assert engine.pool.suspended == {"a"}
    engine.rule.begins("again", "a")
    assert engine.pool.suspended == set() == engine.rule.suspended
    assert list(engine.rule.residents) == ["b", "a"]


def test_who_stays_away_makes_room_for_newcomers(engine: Engine) -> None:
    engine.rests("a", 60)
    engine.rests("long", 10, keep_s=20.0)
    engine.waits("new", 40)
    assert engine.held() == ["new0"]
    engine.now_s += IDLE_S
    assert engine.held() == []
    assert list(engine.rule.residents) == ["long"] and engine.rule.suspensions == 0
    engine.now_s += IDLE_S
    engine.waits("another", 60)
    engine.held()
    assert list(engine.rule.residents) == []


def test_who_says_that_it_is_over_is_not_protected(engine: Engine) -> None:
    engine.rests("a", 60, keep_s=0.0)
    assert engine.pool.suspended == {"a"} and not engine.rule.residents


def test_who_said_that_it_comes_back_goes_after_those_who_did_not() -> None:
    engine = Engine()
    engine.rests("says", 30, keep_s=5.0)
    engine.rests("silent", 30)
    engine.rests("a", 30)
    engine.waits("a", 20, kept=30)
    engine.held()
    assert engine.rule.suspended == {"silent"}
    engine.now_s += 5.0
    engine.rests("silent", 30)
    engine.waiting = engine.waiting[:1]
    engine.pool.suspended.clear()
    engine.held()
    assert engine.rule.suspended == {"says"}, "now it is late"


def test_what_was_ordered_to_be_kept_is_not_suspended(engine: Engine) -> None:
    engine.rests("kept", 40)
    engine.rests("other", 40)
    engine.pool.ordered.add("kept")
    engine.now_s += 2 * IDLE_S
    engine.rests("a", 15)
    engine.waits("a", 30, kept=15)
    assert engine.held() == []
    assert engine.rule.suspended == {"other"}


def test_one_that_never_ran_changes_nothing(engine: Engine) -> None:
    engine.rule.ends("aborted", "a", 1.0, None)
    assert not engine.rule.residents and not engine.rule.suspended


def test_who_is_out_of_the_cache_is_forgotten(engine: Engine) -> None:
    for number in range(50):
        engine.rests(f"w{number}", 2)
    engine.pool.has.clear()
    engine.waits("new", 95)
    engine.held()
    assert not engine.rule.residents and not engine.rule.suspended


# Settings -------------------------------------------------------------------------------------------------


def test_it_is_on_unless_the_environment_says_otherwise() -> None:
    assert settings_of({}) == SuspensionSettings(PATIENCE_S)
    assert settings_of({SUSPEND_VARIABLE: "off"}) is None
    assert settings_of({PATIENCE_VARIABLE: "2.5"}) == SuspensionSettings(2.5)


@pytest.mark.parametrize("said", [{SUSPEND_VARIABLE: "no"}, {PATIENCE_VARIABLE: "soon"}, {PATIENCE_VARIABLE: "-1"}])
def test_a_setting_that_means_nothing_is_refused(said: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(said))} must be"):
        settings_of(said)
