"""One lookup for all tables by stage."""

from __future__ import annotations

import copy
import pickle
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.boundary.stage_keys import StageKey, plain_key, stage_key
from orla_lg.core.boundary.stage_rules import KEEP_STAGES, StageRules, place_names, whole_names
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
    assert len(rules._rulings) <= KEEP_STAGES and found(rules, "a|0") == ("a", "a", 1)


def test_names_of_a_place() -> None:
    assert list(place_names("a|b|c")) == ["a|b|c", "b|c", "c"] and list(place_names("")) == []


IN_TOOL = StageKey("tools|researcher|model", (1,))


def test_a_graph_in_a_tool_may_be_left_out_and_comes_first() -> None:
    assert list(place_names(IN_TOOL)) == ["tools|researcher|model", "researcher|model", "tools|model", "model"]
    asked = [
        ("tools|researcher|model", IN_TOOL), ("researcher|model", IN_TOOL), ("tools|researcher", "tools|researcher"),
        ("researcher", "tools|researcher"), ("tools|model", "tools|model"), ("model", "tools|model"),
        ("tools", "tools"), ("*", IN_TOOL),
    ]  # fmt: skip
    for n, (name, place) in enumerate(asked):
        rules = StageRules({name: n for n, (name, _) in list(enumerate(asked))[n:]})
        assert found(rules, IN_TOOL) == (name, place, n)
        ruling = rules.find(IN_TOOL)
        assert ruling is not None and rules.find(ruling.place) == ruling, "what it covers is covered by it"


def test_of_graphs_in_tools_of_graphs_in_tools_the_innermost_comes_first() -> None:
    stage = StageKey("tools|researcher|tools|critic|model", (1, 3))
    names = [
        "tools|researcher|tools|critic|model", "researcher|tools|critic|model", "tools|tools|critic|model",
        "tools|critic|model", "critic|model", "tools|researcher|tools|critic", "critic",
        "tools|researcher|tools|model", "researcher|tools|model", "tools|researcher|tools", "researcher|tools",
        "researcher", "tools|tools|model", "tools|model", "model", "tools|tools", "tools",
    ]  # fmt: skip
    for n, name in enumerate(names):
        rules = StageRules(dict.fromkeys(names[n:], 0))
        ruling = rules.find(stage)
        assert ruling is not None and ruling.name == name and rules.find(ruling.place) == ruling


def test_a_key_with_a_graphs_name_is_not_the_text_of_a_node() -> None:
    rules = StageRules({"tools|model": 1, "*": 2})
    for _ in range(2):  # in whatever order they are asked for
        assert found(rules, "tools|researcher|model") == ("*", "tools|researcher|model", 2)
        assert found(rules, IN_TOOL) == ("tools|model", "tools|model", 1)


def test_keys_travel_and_are_texts() -> None:
    for same in (copy.deepcopy(IN_TOOL), pickle.loads(pickle.dumps(IN_TOOL))):
        assert same == "tools|researcher|model" == IN_TOOL and same.graphs == (1,) and type(same) is StageKey
    made = stage_key("tools:1f|researcher:@|1|model:2a")
    assert made == IN_TOOL and isinstance(made, StageKey) and made.graphs == (1,)
    assert plain_key(made) == "tools|model" == plain_key("tools|model")


DEEP = st.lists(st.tuples(st.sampled_from("abc"), st.booleans()), min_size=1, max_size=7)


@settings(max_examples=100)
@given(DEEP, st.data())
def test_what_all_graphs_in_tools_share_is_found_as_it_was_without_names(
    parts: list[tuple[str, bool]], data: Any
) -> None:
    graphs = tuple(n for n, (_, is_graph) in enumerate(parts[:-1]) if is_graph)
    stage = StageKey("|".join(f"g{part}" if n in graphs else part for n, (part, _) in enumerate(parts)), graphs)
    entries = data.draw(st.dictionaries(NODES, st.integers()))  # as configurations were before graphs had names
    rules, plain = StageRules(entries), plain_key(stage)
    assert found(rules, stage) == found(rules, plain)
    names = list(place_names(stage))
    assert len(set(names)) == len(names) and {stage, plain} <= set(names) and names[0] == stage
    assert set(whole_names(stage)) >= {stage, plain}
    mentions = [sum(part.startswith("g") for part in name.split("|")) for name in names]
    assert mentions == sorted(mentions, reverse=True)


def test_many_graphs_in_one_another_are_bounded() -> None:
    parts = ["n", "g"] * 20 + ["model"]
    stage = StageKey("|".join(parts), tuple(range(1, 40, 2)))
    assert len(list(place_names(stage))) < 5_000 and plain_key(stage) in whole_names(stage)
