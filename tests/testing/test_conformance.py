"""The suite passes who is honest, and for each liar exactly the check that is about its lie fails."""

from __future__ import annotations

import asyncio
import json
import re
import unittest
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Backend, BackendAdapter
from orla_lg.core.engine.capabilities import Warmed
from orla_lg.openai_api.adapter import OpenAIAdapter
from orla_lg.testing import conformance
from orla_lg.testing.conformance import CHECKS, NonConforming, Report, Result, Status, Subject, conform
from orla_lg.testing.faults import FaultEngine, Reply
from tests.testing import liars
from tests.testing.paragon import Paragon

LIARS: list[tuple[type[Paragon], set[str]]] = [
    (liars.MisnamesItsModel, {"probe_answers"}),
    (liars.NoContext, {"probe_tells_the_context"}),
    (liars.Incomplete, {"capabilities_are_complete"}),
    (liars.NoAdvice, {"advice_is_given"}),
    (liars.NeedlessAdvice, {"advice_is_given"}),
    (liars.ClaimsSleep, {"claims_have_methods"}),
    (liars.Unsteady, {"probe_is_steady"}),
    (liars.SeesGhosts, {"dead_port_is_named"}),
    (liars.NamesNobody, {"dead_port_is_named"}),
    (liars.NotJson, {"fields_are_json"}),
    (liars.TakesOver, {"fields_are_json"}),
    (liars.SendsFractions, {"fields_are_accepted"}),
    (liars.WrongWayRound, {"priority_keeps_order"}),
    (liars.NeverNeutral, {"priority_keeps_order"}),
    (liars.AllAlike, {"priority_keeps_order"}),
    (liars.AllAtOnce, {"tokens_come_one_by_one"}),
    (liars.TooManyTokens, {"usage_comes_at_the_end"}),
    (liars.NoReason, {"usage_comes_at_the_end"}),
    (liars.MixesStreams, {"streams_do_not_mix"}),
    (liars.TakesAnyLength, {"too_long_is_refused"}),
    (liars.RefusesAsBroken, {"unknown_model_is_refused"}),
    (liars.NeverStops, {"closing_frees_the_engine", "stats_follow_the_load"}),
    (liars.AbortsNothing, {"abort_ends_a_call"}),
    (liars.IgnoresSchema, {"schema_is_obeyed"}),
    (liars.HidesItsCache, {"cached_tokens_are_not_hidden"}),
    (liars.WarmsNothing, {"warm_up_helps"}),
    (liars.AlwaysWarm, {"failed_warm_up_says_so"}),
    (liars.FlushesNothing, {"flush_of_a_workflow_frees_it"}),
    (
        liars.WidensFlush,
        {"flush_of_a_workflow_is_not_widened", "flush_leaves_what_is_shared", "flush_of_a_prefix_frees_it"},
    ),
    (liars.FlushesShared, {"flush_leaves_what_is_shared"}),
    (liars.FlushEndsStreams, {"flush_does_not_break_a_stream"}),
    (liars.FlushesHalf, {"flush_of_all_frees_all"}),
    (liars.ReleaseFrees, {"release_keeps_until_needed"}),
    (liars.PinsNothing, {"pin_withstands_pressure"}),
    (liars.PinsForEver, {"pin_ends_with_its_time"}),
    (liars.ReleasesNothing, {"released_goes_first"}),
    (liars.KeepsNothing, {"kept_outlives_the_rest"}),
    (liars.FlushesUnasked, {"unusable_orders_say_so"}),
    (liars.RestoresNothing, {"saved_slot_comes_back"}),
    (liars.RestoresAnything, {"restoring_nothing_says_so"}),
    (liars.MistakesSlots, {"orders_stay_in_their_slot"}),
    (liars.AlwaysIdle, {"stats_follow_the_load"}),
    (liars.Overfull, {"stats_follow_the_load"}),
    (liars.Miscounts, {"tokens_are_those_of_the_prompt"}),
    (liars.SleepsBadly, {"sleep_and_wake"}),
    (liars.BoundToItsLoop, {"works_in_any_loop"}),
    (liars.ClosesOnce, {"closing_twice_is_fine"}),
]


async def report_on(adapter: Paragon, **how: Any) -> Report:
    return await conform(adapter, adapter_at=adapter.at, disruptive=True, **how)


def failed(report: Report) -> set[str]:
    return {result.name for result in report.failures}


@pytest.mark.parametrize("honest", [Paragon, liars.Slotless])
async def test_who_is_honest_passes(honest: type[Paragon]) -> None:
    report = await report_on(honest())
    assert not report.failures, str(report)
    passed = {result.name for result in report.results if result.status is Status.PASSED}
    wire_only = {check.name for check in conformance.faulty.CHECKS}
    shared_only = {"pin_ends_with_its_time", "released_goes_first", "kept_outlives_the_rest"}
    slots_only = {"saved_slot_comes_back", "orders_stay_in_their_slot"}
    elsewhere = wire_only | (slots_only if honest is liars.Slotless else shared_only)
    assert {check.name for check in CHECKS} - passed - elsewhere == {
        "tools_are_taken", "cached_tokens_are_not_hidden",
    }  # fmt: skip


@pytest.mark.parametrize(("liar", "named"), LIARS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_liar_is_named(liar: type[Paragon], named: set[str]) -> None:
    report = await report_on(liar())
    assert failed(report) == named, str(report)


async def test_an_invented_cache_is_seen_by_every_check_that_measures_it() -> None:
    class Invents(liars.Counting):
        def told(self, usage: Usage, body: Mapping[str, Any]) -> Usage:
            return replace(usage, cached_tokens=usage.prompt_tokens - 1)

    report = await report_on(Invents())
    assert {"cached_tokens_are_real", "flush_of_a_workflow_frees_it", "flush_of_all_frees_all"} <= failed(report)
    assert "stats_follow_the_load" not in failed(report)
    assert "cached_tokens_are_real" in failed(await report_on(liars.CountsNoCache()))


async def test_every_check_has_a_liar() -> None:
    lied = {name for _, names in [*LIARS, *WIRE_LIARS] for name in names} | {"cached_tokens_are_real", "pin_is_told"}
    assert {check.name for check in CHECKS} == lied


# On the wire ----------------------------------------------------------------------------------------------


WIRE_LIARS: list[tuple[type[OpenAIAdapter], set[str]]] = [
    (liars.Credulous, {"broken_streams_raise"}),
    (liars.ReadsAnything, {"nonsense_raises"}),
    (liars.ForgetsStatus, {"refusals_keep_their_status"}),
    (liars.BelievesCounts, {"false_counts_do_no_harm"}),
    (liars.ProbesNothing, {"probe_of_nonsense_raises"}),
    (liars.ClaimsTools, {"tools_are_taken"}),
]


def no_such_tools(seen: Any) -> Reply | None:
    return Reply(status=400) if "parallel_tools" in seen.body else None


@pytest.mark.parametrize(("liar", "named"), WIRE_LIARS, ids=lambda value: getattr(value, "__name__", ""))
async def test_a_liar_on_the_wire_is_named(liar: type[OpenAIAdapter], named: set[str]) -> None:
    with FaultEngine(otherwise=Reply(token_s=0.002), rule=no_such_tools) as engine:
        report = await conform(liar(Backend("b", engine.url)))
    assert failed(report) == named, str(report)


# The suite itself -----------------------------------------------------------------------------------------


async def test_a_report_says_what_and_where() -> None:
    report = await report_on(
        liars.FlushesNothing(), only={"probe_answers", "flush_of_a_workflow_frees_it", "tools_are_taken"}
    )
    assert [result.status for result in report.results] == [Status.PASSED, Status.SKIPPED, Status.FAILED]
    assert not report.ok
    table = str(report)
    assert table.startswith("FlushesNothing on http://paragon/v1 1\n")
    assert re.search(r"failed +\d\.\d s  flush_of_a_workflow_frees_it  the effect was freed, yet \d+% of its", table)
    assert re.search(r"1 passed, 1 failed, 1 skipped in \d", table)
    with pytest.raises(
        NonConforming, match=r"(?s)FlushesNothing does not conform:.*flush_of_a_workflow_frees_it: the"
    ):
        report.raise_for_failures()
    assert json.loads(json.dumps(report.asdict()))["results"][0]["asserts"].startswith("The engine answers its probe")


async def test_nothing_checked_is_not_well() -> None:
    report = await report_on(Paragon(), only={"tools_are_taken"})
    assert not report.ok
    with pytest.raises(NonConforming, match="nothing could be checked"):
        report.raise_for_failures()


async def test_an_engine_that_is_away_fails_once() -> None:
    away = Paragon(Backend("paragon", "http://nowhere/v1"))
    report = await conform(away, adapter_at=Paragon().at)
    assert failed(report) == {"probe_answers"}
    assert report.named("usage_comes_at_the_end").message == "the engine does not answer its probe"


async def test_results_come_as_they_are_made() -> None:
    seen: list[Result] = []
    report = await report_on(Paragon(), only={"probe_answers", "probe_is_steady"}, progress=seen.append)
    assert tuple(seen) == report.results


async def test_a_check_that_hangs_has_failed() -> None:
    class Hangs(Paragon):
        async def warm(self, body: Mapping[str, Any]) -> Warmed:
            await asyncio.Event().wait()
            raise AssertionError

    report = await report_on(Hangs(), only={"warm_up_helps", "failed_warm_up_says_so"}, limit_s=0.2)
    assert failed(report) == {"warm_up_helps", "failed_warm_up_says_so"}
    assert report.failures[0].message == "warm_up_helps: no end after 0.2 s"


PARAGON = Paragon()


@pytest.mark.parametrize("check", CHECKS, ids=str)
async def test_each_check_is_a_test(check: conformance.Check) -> None:
    """As an adapter's author would write it; what does not apply is skipped."""
    subject = Subject(PARAGON, adapter_at=PARAGON.at, disruptive=True)
    assert check.asserts.endswith(".")
    try:
        await check.verify(subject)
    except unittest.SkipTest as reason:
        assert str(reason)


async def test_verify_raises_what_test_runners_know() -> None:
    checks = {check.name: check for check in CHECKS}
    with pytest.raises(AssertionError, match="yet"):
        await checks["flush_of_a_workflow_frees_it"].verify(Subject(liars.FlushesNothing()))
    with pytest.raises(unittest.SkipTest, match="unsupported"):
        await checks["tools_are_taken"].verify(Subject(Paragon()))


def test_a_paragon_is_an_adapter() -> None:
    adapter: BackendAdapter = Paragon()
    assert adapter.keep_alive
