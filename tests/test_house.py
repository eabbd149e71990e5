"""The house keeps its shape: what ``make house`` counts may not grow again.

A limit above its goal is what is left to do. It only goes down: where a figure falls well below its limit, the test
asks for the limit to follow.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from typing import Any

import pytest

from tests.test_layering import CIRCLES_LEFT, ROOT

SPINE_FILES, SPINE_LINES = 17, 4_000
GOAL_SPINE_FILES, GOAL_SPINE_LINES = 17, 4_000
CALLS = 263
"""Python calls of the simplest wrapped call."""
GOAL_CALLS = 300
MARGIN = 1.01
FOLLOWS = 0.9
"""A figure below so much of its limit asks for another limit."""

NAMES_LEFT: set[str] = set()
"""Names of classes that stand in two or more modules. The list only shrinks."""


@pytest.fixture(scope="module")
def house() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        yield import_module("bench.house")


@pytest.fixture(scope="module")
def modules(house: Any) -> list[Any]:
    found: list[Any] = house.modules(*house.PACKAGES)
    return found


@pytest.fixture(scope="module")
def core(house: Any, modules: list[Any]) -> list[Any]:
    return [module for module in modules if module.name.startswith(house.CORE)]


def within(figure: int, limit: int, goal: int, *, margin: float = 1.0) -> None:
    assert figure <= limit * margin
    assert limit == goal or figure > limit * FOLLOWS, f"{figure} is far below {limit}: lower the limit"


def test_no_circle_but_those_on_the_list(house: Any, modules: list[Any]) -> None:
    names = {module.name for module in modules}
    left = {
        module.name: {other for other in house.imports(module, names) if (module.name, other) not in CIRCLES_LEFT}
        for module in modules
    }
    assert house.circles(left) == []


def test_no_place_in_the_core_tells_kinds_of_engine_apart(house: Any, core: list[Any]) -> None:
    assert not [module.name for module in core if house.told_apart(module)]


def test_a_name_means_one_class(house: Any, modules: list[Any]) -> None:
    found = house.names_twice(modules)
    assert set(found) == NAMES_LEFT, {name: found.get(name) for name in set(found) ^ NAMES_LEFT}


def test_the_spine_grows_no_more(house: Any, core: list[Any]) -> None:
    spine = house.spine(core)
    within(len(spine), SPINE_FILES, GOAL_SPINE_FILES)
    within(sum(each.lines for each in spine), SPINE_LINES, GOAL_SPINE_LINES)


def test_every_lock_of_the_core_has_its_reason(house: Any, core: list[Any]) -> None:
    made = [name for module in core for name, count in house.locks(module).items() for _ in range(count)]
    assert sorted(made) == sorted(house.REASONS)


def test_the_simplest_call_passes_no_more(house: Any) -> None:
    call, _ = house.simplest_call()
    within(call.calls.total(), CALLS, GOAL_CALLS, margin=MARGIN)
