"""The run over several sites: a stall is a wrong row and the run goes on, a stop keeps what was found."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from random import Random
from typing import Any, Self

import pytest

from tests.scale_faults import running
from tests.scale_faults.account import Flow, Row
from tests.scale_faults.kinds import Kind
from tests.scale_faults.processes import OVER, Stall, until
from tests.scale_faults.running import Found, Run, Work


class FakeSite:
    """A site without processes."""

    def __init__(self, number: int, times: int) -> None:
        self.number, self.times, self.open, self.ended = number, times, False, False

    def __enter__(self) -> Self:
        self.open = True
        return self

    def __exit__(self, *exc: object) -> None:
        self.open = False

    def end(self) -> None:
        self.ended = True

    def ready(self, **how: Any) -> None:
        pass

    cores_are = gateways_are = ready

    def calls_take(self, long_s: float) -> None:
        pass


class FakeWatch:
    def __init__(self, site: FakeSite, kind: str) -> None:
        self.site, self.row = site, Row(kind)

    def fault(self, make: Any, dice: Random) -> None:
        self.row.faults += 1
        self.row.flows.append(make(self.site, dice))

    def note(self) -> None:
        self.row.calls = 10 * self.row.faults
        self.row.most = {"main": 8}

    end = note


@pytest.fixture
def sites(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeSite]]:
    monkeypatch.setattr(running, "Watch", FakeWatch)
    yield []
    OVER.clear()


def made(sites: list[FakeSite], works: list[Work], many: int = 2) -> Run:
    def opened(number: int, times: int) -> Any:
        sites.append(FakeSite(number, times))
        return sites[-1]

    return Run(works, many, opened)


def test_kinds_are_made_at_several_sites_at_once(sites: list[FakeSite]) -> None:
    both = threading.Barrier(2, timeout=10)

    def meet(site: Any, dice: Random) -> Flow:
        both.wait()
        return Flow(1.0, 2.0)

    run = made(sites, [Work("one", Kind(meet, 3), 3), Work("two", Kind(meet, 3), 3)])
    assert run.run()
    assert {name: found.row.faults for name, found in run.found.items()} == {"one": 3, "two": 3}
    assert {site.number for site in sites} == {0, 1} and all(site.ended and not site.open for site in sites)
    assert not [each for found in run.found.values() for each in found.wrong()]


def test_a_stall_is_a_wrong_row_and_the_run_goes_on_with_a_fresh_site(sites: list[FakeSite]) -> None:
    def stalls_once(site: Any, dice: Random) -> Flow:
        if site.times == 1:
            raise Stall("not within 60 s: the engine is full\ncore 0: ready; in_flight 8")
        return Flow(1.0, 2.0)

    def fine(site: Any, dice: Random) -> Flow:
        return Flow(0.5, 0.5)

    run = made(sites, [Work("stalls", Kind(stalls_once, 4), 4), Work("fine", Kind(fine, 2), 2)], many=1)
    assert run.run()
    found = run.found["stalls"]
    assert found.row.faults == 4 and found.row.calls == 40 and len(found.row.flows) == 3
    assert found.wrong() == ["stalls: stalled in fault 1: not within 60 s: the engine is full"]
    assert "in_flight 8" in found.row.stalls[0]
    assert run.found["fine"].wrong() == []
    assert [(site.times, site.ended) for site in sites] == [(1, False), (2, True)]


def test_a_kind_that_always_stalls_is_left(sites: list[FakeSite]) -> None:
    def broken(site: Any, dice: Random) -> Flow:
        raise RuntimeError("a fault of the instrument")

    run = made(sites, [Work("broken", Kind(broken, 9), 9)])
    assert run.run()
    wrong = run.found["broken"].wrong()
    assert len(wrong) == running.MOST_STALLS and all("stalled in fault" in each for each in wrong)
    assert "RuntimeError: a fault of the instrument" in run.found["broken"].row.stalls[0]


def test_a_stop_keeps_the_rows(sites: list[FakeSite]) -> None:
    def fine(site: Any, dice: Random) -> Flow:
        return Flow(0.5, 0.5)

    def hangs(site: Any, dice: Random) -> Flow:
        signal.raise_signal(signal.SIGINT)
        until(lambda: False, lambda: "it never comes")
        raise AssertionError

    run = made(sites, [Work("fine", Kind(fine, 9), 9), Work("hangs", Kind(hangs, 1), 1)], many=1)
    assert not run.run()
    assert set(run.found) == {"fine"} and not sites[0].open and not sites[0].ended


def test_a_control_is_wrong_where_the_bound_holds() -> None:
    control = Work("control: any", Kind(lambda site, dice: None, 1), 1, is_control=True)
    assert Found(control, Row("control: any", 1, 10, most={"main": 9})).wrong() == []
    row = Row("control: any", 1, 10, most={"main": 8}, stalls=["in fault 1: x\ny"])
    assert Found(control, row).wrong() == [
        "control: any: stalled in fault 1: x", "control: any: the bound held, so the other runs prove nothing",
    ]  # fmt: skip


def test_a_control_is_made_until_it_breaks_a_bound(sites: list[FakeSite], monkeypatch: pytest.MonkeyPatch) -> None:
    class Watch(FakeWatch):
        def note(self) -> None:
            self.row.most = {"main": 9 if len(times) == 3 else 8}

        end = note

    times: list[int] = []

    def breaks_at_last(site: Any, dice: Random) -> Flow:
        times.append(1)
        return Flow(1.0, 1.0)

    monkeypatch.setattr(running, "Watch", Watch)
    run = made(sites, [Work("control", Kind(breaks_at_last, 5), 5, is_control=True)])
    assert run.run() and len(times) == 3
    assert run.found["control"].wrong() == []


def test_rows_of_two_sites_are_one() -> None:
    row = Row("k", 2, 10, 1, lost=1, most={"main": 7}, flows=[Flow(1.0, 1.0)])
    row.add(Row("k", 1, 5, 0, twice=1, most={"main": 8, "quick": 3}, flows=[Flow(2.0, 2.0)], stalls=["x"]))
    assert row == Row(
        "k", 3, 15, 1, lost=1, twice=1, most={"main": 8, "quick": 3}, flows=[Flow(1.0, 1.0), Flow(2.0, 2.0)],
        stalls=["x"],
    )  # fmt: skip
