"""One lookup for all tables by stage."""

from __future__ import annotations

import copy
import pickle

from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.boundary.stage_rules import KEEP_STAGES, StageRules, place_names
from orla_lg.core.limits.limits import Limit, Limits

NODES = st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map("|".join)


def found(rules: StageRules[int], stage: str) -> tuple[str, str, int] | None:
    ruling = rules.find(stage)
    return None if ruling is None else (ruling.name, ruling.place, ruling.entry)


def test_own_name_then_each_node_around_then_star() -> None:
    rules = StageRules({"desk|support|model": 1, "support|model": 2, "model": 3, "support": 4, "desk": 5, "*": 6})
    stages = ("desk|support|model", "x|support|model", "x|model", "a|support|b|c")
    assert [found(rules, stage) for stage in stages] == [
        ("desk|support|model", "desk|support|model", 1), ("support|model", "x|support|model", 2),
        ("model", "x|model", 3), ("support", "a|support", 4),
    ]  # fmt: skip
    assert found(rules, "desk|x|y") == ("desk", "desk", 5)
    assert found(rules, "x|y") == ("*", "x|y", 6), "each of the others by itself"
    assert found(rules, "") is None and found(StageRules({"a": 1}), "b") is None


@settings(max_examples=60)
@given(st.dictionaries(st.one_of(NODES, st.just("*")), st.integers()), NODES)
def test_what_decides_is_the_longest_end_of_the_innermost_place(entries: dict[str, int], stage: str) -> None:
    parts = stage.split("|")
    asked = ["|".join(parts[start:end]) for end in range(len(parts), 0, -1) for start in range(end)]
    places = ["|".join(parts[:end]) for end in range(len(parts), 0, -1) for _ in range(end)]
    expected = next(((n, p, entries[n]) for n, p in zip(asked, places, strict=True) if n in entries), None)
    if expected is None and "*" in entries:
        expected = ("*", stage, entries["*"])
    rules = StageRules(entries)
    assert found(rules, stage) == found(rules, stage) == expected


def test_it_is_a_table_that_travels() -> None:
    rules = StageRules({"a": 1, "*": 2})
    assert rules == {"a": 1, "*": 2} and len(rules) == 2 and repr(rules) == "{'a': 1, '*': 2}" and rules["a"] == 1
    for same in (copy.deepcopy(rules), pickle.loads(pickle.dumps(rules))):
        assert same == rules and found(same, "a|b") == ("a", "a", 1)
    limits = pickle.loads(pickle.dumps(Limits(stages={"a": Limit(calls=3)})))
    assert limits.of_stage("a|b").entry == Limit(calls=3)
    assert limits == Limits(stages={"a": Limit(calls=3)}) and "rules" not in repr(limits)


def test_what_it_remembers_is_bounded() -> None:
    rules = StageRules({"a": 1, "*": 2})
    for n in range(2 * KEEP_STAGES):
        rules.find(f"a|{n}")
    remembered = rules.find.__self__  # type: ignore[attr-defined]
    assert len(remembered) <= KEEP_STAGES and found(rules, "a|0") == ("a", "a", 1)


def test_names_of_a_place() -> None:
    assert list(place_names("a|b|c")) == ["a|b|c", "b|c", "c"] and list(place_names("")) == []
