"""Text from outside: whatever it holds, a terminal shows it, a file takes it, and JSON gives it back."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.boundary.plain import MOST_CHARS, is_path, json_line, shown, shown_within

ANY_TEXT = st.text(st.characters(codec=None, categories=None))
"""Lone surrogates and control characters among it."""

NASTY = (
    "\ud800",
    "\0",
    "a\nb",
    "\x1b[2J",
    "\u202e",
    "\u2028",
    "\x85",
    "\ufeff",
    "x" * 2_000_000,
    "\ud83d\ude00",
    "ü",
)


class Unfriendly:
    def __str__(self) -> str:
        raise ZeroDivisionError


@given(ANY_TEXT, st.integers(2, 300))
def test_what_is_shown_fits_one_line_of_any_terminal(text: str, most: int) -> None:
    line = shown(text, most)
    line.encode()
    assert line.splitlines() in ([line], []) and len(line) <= most + 40
    assert all(each >= " " and each not in "\x7f\u202e\u2066" for each in line)
    assert text != line or len(text) <= most


@given(st.dictionaries(ANY_TEXT, ANY_TEXT | st.integers() | st.lists(ANY_TEXT)))
def test_json_is_one_line_and_gives_back_what_was_written(fields: dict[str, Any]) -> None:
    line = json_line(fields)
    assert line.encode() and "\n" not in line and "\u2028" not in line and "\x1b" not in line
    assert json.loads(line) == json.loads(json.dumps(fields)), "which joins two halves of a pair, as all readers do"
    assert json.loads(json_line(fields, indent=2)) == json.loads(line)


def test_a_field_that_json_cannot_hold_costs_that_field_alone() -> None:
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    fields = {"a": 1, "endless": endless, "keys": {(1, 2): 3}, "unfriendly": Unfriendly(), "deep": deep, "b": "ü"}
    said = json.loads(json_line(fields))
    assert (said["a"], said["b"], said["keys"]) == (1, "ü", "{(1, 2): 3}")
    assert "cannot be written (Unfriendly: ZeroDivisionError)" in said["unfriendly"]
    assert set(said) == set(fields)
    while deep:  # its destruction would be as deep
        deep = deep.pop()


def test_a_long_text_is_cut_and_says_how_long_it_was() -> None:
    assert shown("x" * 10_000) == "x" * (MOST_CHARS - 1) + "… (10000 characters)"
    assert shown("x" * 24, 24) == "x" * 24 and shown("x" * 25, 24) == "x" * 23 + "…"
    assert len(shown("\x1b" * 24, 24)) == 24, "an escape takes room, too"
    assert shown(None) == "None" and shown(7) == "7"


def test_plain_data_keeps_its_shape() -> None:
    assert shown_within({"\ud800": ["\n", 1, None, ("\0",)], "b": {"c": 1.5}}) == {
        "\\ud800": ["\\u000a", 1, None, ["\\u0000"]], "b": {"c": 1.5}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("path", "right"), [("a/b", True), ("ü", True), ("\udcff", True), ("\ud800", False), ("\0", False)]
)
def test_what_can_be_a_path(path: str, right: bool) -> None:
    assert is_path(path) is right
