from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core import call as call_module
from orla_lg.core.call import NO_HINTS, Ask, Hints
from orla_lg.errors import ConfigError
from tests.core.fakes import a_call


def test_hints_fill_each_others_gaps() -> None:
    strong, weak = Hints(priority=1.0), Hints(priority=2.0, tenant="t")
    assert strong.over(weak) == Hints(priority=1.0, tenant="t")
    assert NO_HINTS.over(weak) is weak and weak.over(NO_HINTS) is weak
    assert Hints(priority=0.0).over(weak).priority == 0.0


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cache": "flsh"}, "'flsh' is not one of"),
        ({"deadline_s": 0}, "must be positive"),
        ({"priority": math.nan}, "must be a number"),
        ({"priority": "high"}, "must be a number, got 'high'"),
        ({"priority": True}, "must be a number, got True"),
        ({"deadline_s": True}, "must be positive, in seconds, got True"),
        ({"tenant": ["a"]}, r"tenant must be a name, got \['a'\]"),
        ({"deadline_s": "soon"}, "must be positive, in seconds, got 'soon'"),
        ({"prority": 1}, r"unknown hint 'prority'; did you mean 'priority'\? known: cache, deadline_s, priority"),
        ("urgent", "expected Hints, or a dict of them, got str"),
    ],
)
def test_hints_are_checked(said: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Hints.of(said)


def test_hints_are_themselves_and_pass_over_what_may_stand_beside_them() -> None:
    assert Hints.of(NO_HINTS) is NO_HINTS
    assert Hints.of({"priority": 1, "limits": {}}, beside=("limits",)) == Hints(priority=1)
    with pytest.raises(ConfigError, match="known: cache, deadline_s, limits, priority, tenant, variant"):
        Hints.of({"limit": {}}, beside=("limits",))


def test_priority_and_deadline_of_a_call() -> None:
    plain, hinted = a_call(), a_call(priority=2.0, deadline_s=1.5, at_s=10.0)
    assert (plain.priority, plain.deadline_at_s) == (0.0, None)
    assert (hinted.priority, hinted.deadline_at_s) == (2.0, 11.5)


MESSAGES = st.lists(st.sampled_from([
    {"role": "user", "content": "a"},
    {"role": "user", "content": "b"},
    {"role": "assistant", "content": "a", "tool_calls": [1]},
    {"role": "assistant", "content": None},
]), max_size=5)  # fmt: skip


@given(one=MESSAGES, other=MESSAGES)
def test_prefixes_are_equal_exactly_as_far_as_the_prompts_are(one: list[object], other: list[object]) -> None:
    def shared(left: object, right: object) -> int:
        equal = [a == b for a, b in zip(left, right, strict=False)]
        return equal.index(False) if False in equal else len(equal)

    assert shared(Ask("m", one).prefix, Ask("m", other).prefix) == shared(one, other)


@pytest.mark.parametrize(
    ("message", "chars"),
    [
        ({"role": "user", "content": "four"}, 4),
        ({"role": "user", "content": [{"type": "text", "text": "four"}, {"type": "image_url"}, "odd"]}, 4),
        ({"role": "assistant", "content": None}, 0),
        ("odd", 0),
    ],
)
def test_only_text_has_characters(message: object, chars: int) -> None:
    assert Ask("m", [message]).prompt_chars == chars


def test_any_message_has_a_place_in_the_prefix() -> None:
    assert Ask("m", ["odd"]).prefix == Ask("m", ["odd"]).prefix != Ask("m", ["even"]).prefix


SAID = {"role": "user", "content": "hello"}
CALLED = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}


def test_a_prompt_has_the_same_hashes_in_every_process() -> None:
    """Figures, and no second process, so that a change of the hash itself shows too."""
    assert Ask("m", [SAID, CALLED]).prefix == (3834816131478098302, 12215088360509172694)
    assert Ask("m", [SAID], tools=True).prefix == (299230522416455556,)
    assert Ask("m", [SAID], scope="acme").prefix == (13718387462418678584,)


def test_hashes_are_of_eight_bytes_and_of_all_text() -> None:
    odd = Ask("m", [{"role": "user", "content": "\ud800"}, SAID])
    assert all(0 <= each < 2**64 for each in odd.prefix) and len(set(odd.prefix)) == 2


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_hashes_do_not_depend_on_what_is_remembered_of_them(keep: int, monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = [SAID, CALLED, SAID]
    usual = Ask("m", prompt).prefix
    assert Ask("m", prompt).prefix == usual
    monkeypatch.setattr(call_module, "KEEP_HASHES", keep)
    monkeypatch.setattr(call_module, "_CHAINED", {})
    assert [Ask("m", prompt).prefix for _ in range(2)] == [usual, usual]
    assert len(call_module._CHAINED) <= max(1, keep)
