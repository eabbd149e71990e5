"""Random interleavings of what replicas, cores and connections do: the bound holds, nothing is lost or doubled.

And the control: without the wait for the roster the same machine exceeds the bound.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from orla_lg.serve.link import orphans
from tests.serve.machine import BOUND, LETS_GO_S, Machine

REPLICAS = 3
AT = st.integers(0, REPLICAS - 1)
PICK = st.integers(0, 5)
LATE = st.lists(AT, max_size=REPLICAS, unique=True)


class Links(RuleBasedStateMachine):
    heeds_roster = True

    def __init__(self) -> None:
        super().__init__()
        self.machine = Machine(replicas=REPLICAS, heeds_roster=self.heeds_roster)
        self.all_enter()

    @rule(at=AT)
    def enters(self, at: int) -> None:
        self.machine.enters(at)

    @rule()
    def all_enter(self) -> None:
        for at in range(REPLICAS):
            self.machine.enters(at)

    @rule(at=AT, pick=PICK)
    def answers(self, at: int, pick: int) -> None:
        self.machine.answers(at, pick)

    @rule(at=AT, pick=PICK)
    def ends(self, at: int, pick: int) -> None:
        self.machine.ends(at, pick)

    @rule(at=AT, pick=PICK)
    def cancels(self, at: int, pick: int) -> None:
        self.machine.cancels(at, pick)

    @rule(at=AT, pick=PICK)
    def misses(self, at: int, pick: int) -> None:
        self.machine.misses(at, pick)

    @rule(at=AT)
    def drops(self, at: int) -> None:
        self.machine.drops(at)

    @rule(at=AT)
    def blips(self, at: int) -> None:
        self.machine.blips(at)

    @rule(at=AT, pick=PICK)
    def ends_another(self, at: int, pick: int) -> None:
        self.machine.ends(at, pick)

    @rule(at=AT)
    def returns(self, at: int) -> None:
        self.machine.returns(at)

    @rule(seconds=st.sampled_from((0.05, 0.6, 2.5)))
    def passes(self, seconds: float) -> None:
        self.machine.passes(seconds)

    @rule(at=AT)
    def dies(self, at: int) -> None:
        self.machine.dies(at)

    @rule(late=LATE)
    def core_dies(self, late: list[int]) -> None:
        self.machine.core_dies(late)

    @rule(late=LATE)
    def core_freezes(self, late: list[int]) -> None:
        self.machine.core_freezes(late)

    def teardown(self) -> None:
        try:
            self.machine.look()
            self.machine.finish()
        finally:
            self.machine.close()


class Heedless(Links):
    """The same, but a new core grants at once."""

    heeds_roster = False

    def teardown(self) -> None:
        self.machine.close()


EXAMPLES = int(os.environ.get("ORLA_LG_EXAMPLES", "15"))
SETTINGS = settings(
    max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orphans, "SILENT_LETS_GO_S", LETS_GO_S)


def test_the_bound_holds_whatever_happens() -> None:
    run_state_machine_as_test(Links, settings=SETTINGS)


def test_without_the_wait_for_the_roster_it_does_not() -> None:
    chosen = settings(SETTINGS, max_examples=200, derandomize=True, phases=[Phase.generate], database=None)
    with pytest.raises(AssertionError, match=f"at the engine, {BOUND} are allowed"):
        run_state_machine_as_test(Heedless, settings=chosen)
