"""The expected longest way, against slower ways to say the same."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.lookahead.longest_path import MAX_ROUNDS, components, longest_paths

STAGES = "abcde"
COSTS = st.fixed_dictionaries({stage: st.floats(0, 10) for stage in STAGES})

Graph = dict[str, dict[str, float]]


def test_branches_side_by_side_wait_for_the_longest() -> None:
    costs = {"a": 1.0, "b": 5.0, "c": 2.0, "d": 1.0}
    chances = {"a": {"b": 1.0, "c": 1.0}, "b": {"d": 1.0}, "c": {"d": 1.0}, "d": {"end": 1.0}}
    assert longest_paths(costs, chances) == {"a": 7.0, "b": 6.0, "c": 3.0, "d": 1.0}


def test_a_choice_counts_by_its_chances() -> None:
    ways = longest_paths({"a": 1.0, "b": 8.0, "c": 4.0}, {"a": {"b": 0.25, "c": 0.5, "end": 0.25}, "b": {}, "c": {}})
    assert ways["a"] == 1 + 0.25 * 8 + 0.5 * 4


def test_a_loop_counts_as_often_as_it_is_gone_round() -> None:
    ways = longest_paths({"ask": 2.0, "tool": 1.0}, {"ask": {"tool": 0.75}, "tool": {"ask": 1.0}})
    assert ways["ask"] == pytest.approx(4 * 2 + 3 * 1, rel=1e-3), "a chance of 3/4 to go on means four turns"


def test_a_loop_without_an_exit_is_followed_for_a_while() -> None:
    assert longest_paths({"a": 1.0}, {"a": {"a": 1.0}})["a"] == MAX_ROUNDS


@st.composite
def chains(draw: st.DrawFn) -> Graph:
    """Graphs in which each stage is followed by one other at most, loops among them; every turn may be the last."""
    chances: Graph = {}
    for stage in STAGES:
        weights = draw(st.lists(st.integers(0, 4), min_size=len(STAGES), max_size=len(STAGES)))
        total = sum(weights) + 2 + sum(weights) // 2  # a third or more ends
        chances[stage] = {target: weight / total for target, weight in zip(STAGES, weights, strict=True) if weight}
    return chances


@settings(deadline=None)
@given(COSTS, chains())
def test_one_after_the_other_it_is_the_sum_of_all_expected_visits(costs: dict[str, float], chances: Graph) -> None:
    ways = longest_paths(costs, chances)
    for start in STAGES:
        here, expected = {start: 1.0}, 0.0
        for _ in range(200):
            expected += sum(mass * costs[stage] for stage, mass in here.items())
            onward = dict.fromkeys(STAGES, 0.0)
            for stage, mass in here.items():
                for target, chance in chances[stage].items():
                    onward[target] += mass * chance
            here = onward
        assert ways[start] == pytest.approx(expected, rel=1e-3, abs=1e-9)


@st.composite
def forward(draw: st.DrawFn) -> dict[str, list[str]]:
    """Graphs without loops in which a stage is followed by all its targets."""
    return {
        stage: draw(st.lists(st.sampled_from(STAGES[n + 1 :] or "-"), unique=True)) for n, stage in enumerate(STAGES)
    }


@settings(deadline=None)
@given(COSTS, forward())
def test_side_by_side_it_is_the_longest_of_all_paths(costs: dict[str, float], onward: dict[str, list[str]]) -> None:
    ways = longest_paths(costs, {stage: dict.fromkeys(targets, 1.0) for stage, targets in onward.items()})

    def paths(stage: str) -> list[list[str]]:
        beyond = [path for target in onward.get(stage, ()) for path in paths(target)]
        return [[stage, *path] for path in beyond] or [[stage]]

    for stage in STAGES:
        longest = max(sum(costs.get(each, 0.0) for each in path) for path in paths(stage))
        assert ways[stage] == pytest.approx(longest)


@settings(deadline=None)
@given(COSTS, forward(), st.dictionaries(st.sampled_from(STAGES), st.integers(1, 9)))
def test_a_choice_beside_what_always_follows(
    costs: dict[str, float], onward: dict[str, list[str]], chosen: dict[str, int]
) -> None:
    """The first target of a stage always starts, and of the others one, or none, with equal chances."""
    chances: Graph = {}
    for stage, targets in onward.items():
        share = 1.0 / (len(targets) - 1 + chosen.get(stage, 0)) if targets[1:] else 0.0
        chances[stage] = {**dict.fromkeys(targets[1:], share), **dict.fromkeys(targets[:1], 1.0)}
    ways = longest_paths(costs, chances)
    for stage, targets in onward.items():
        always = max((ways.get(target, 0.0) for target in targets[:1]), default=0.0)
        choices = [(chances[stage][target], ways.get(target, 0.0)) for target in targets[1:]]
        none = 1.0 - sum(chance for chance, _ in choices)
        length = none * always + sum(chance * max(always, way) for chance, way in choices)
        assert ways[stage] == pytest.approx(costs[stage] + length)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(STAGES), st.sets(st.sampled_from(STAGES))))
def test_components_are_what_reaches_each_other_and_what_follows_comes_first(edges: dict[str, set[str]]) -> None:
    onward = {stage: edges.get(stage, set()) for stage in STAGES}

    def reached(start: str) -> set[str]:
        seen, ahead = set[str](), [start]
        while ahead:
            for target in onward[ahead.pop()] - seen:
                seen.add(target)
                ahead.append(target)
        return seen

    found = components(onward)
    place = {stage: number for number, component in enumerate(found) for stage in component}
    assert sorted(itertools.chain(*found)) == sorted(STAGES)
    for one, other in itertools.product(STAGES, repeat=2):
        together = one == other or (other in reached(one) and one in reached(other))
        assert (place[one] == place[other]) == together
        assert other not in reached(one) or place[other] <= place[one]


def test_a_long_chain_needs_no_deep_stack() -> None:
    length = 5000
    chances = {str(n): {str(n + 1): 1.0} for n in range(length)}
    assert math.isclose(longest_paths({str(n): 1.0 for n in range(length)}, chances)["0"], length)
