"""Globs as Go's ``filepath.Match`` reads them: its own table of cases, and a naive matcher."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.guard.globs import read_glob
from orla_lg.errors import ConfigError

GO = [
    ("abc", "abc", True), ("*", "abc", True), ("*c", "abc", True), ("a*", "a", True), ("a*", "abc", True),
    ("a*", "ab/c", False), ("a*/b", "abc/b", True), ("a*/b", "a/c/b", False),
    ("a*b*c*d*e*/f", "axbxcxdxe/f", True), ("a*b*c*d*e*/f", "axbxcxdxexxx/f", True),
    ("a*b*c*d*e*/f", "axbxcxdxe/xxx/f", False), ("a*b*c*d*e*/f", "axbxcxdxexxx/fff", False),
    ("a*b?c*x", "abxbbxdbxebxczzx", True), ("a*b?c*x", "abxbbxdbxebxczzy", False), ("ab[c]", "abc", True),
    ("ab[b-d]", "abc", True), ("ab[e-g]", "abc", False), ("ab[^c]", "abc", False), ("ab[^b-d]", "abc", False),
    ("ab[^e-g]", "abc", True), ("a\\*b", "a*b", True), ("a\\*b", "ab", False), ("a?b", "a☺b", True),
    ("a[^a]b", "a☺b", True), ("a???b", "a☺b", False), ("a[^a][^a][^a]b", "a☺b", False), ("[a-ζ]*", "α", True),
    ("*[a-ζ]", "A", False), ("a?b", "a/b", False), ("a*b", "a/b", False), ("[\\]a]", "]", True),
    ("[\\-]", "-", True), ("[x\\-]", "x", True), ("[x\\-]", "-", True), ("[x\\-]", "z", False),
    ("[\\-x]", "x", True), ("[\\-x]", "-", True), ("[\\-x]", "a", False), ("*x", "xxx", True),
]  # fmt: skip
"""From ``match_test.go`` of Go's ``path/filepath``."""

MALFORMED = ["[]a]", "[-]", "[x-]", "[-x]", "\\", "[a-b-c]", "[", "[^", "[^bc", "a[", "a/b[", "x*[a", "a\\"]


@pytest.mark.parametrize(("pattern", "name", "matches"), GO)
def test_as_go_matches(pattern: str, name: str, matches: bool) -> None:
    assert read_glob(pattern).matches(name) == matches


@pytest.mark.parametrize("pattern", MALFORMED)
def test_what_is_malformed_is_refused(pattern: str) -> None:
    with pytest.raises(ConfigError, match="pattern"):
        read_glob(pattern)


def test_a_star_does_not_cross_a_slash() -> None:
    assert not read_glob("backend:*").matches("backend:org/model")
    assert read_glob("backend:*/*").matches("backend:org/model")


def naive(pattern: str, name: str) -> bool:
    """Match by trying everything; classes are not among the patterns."""
    if not pattern:
        return not name
    first, rest = pattern[0], pattern[1:]
    if first == "*":
        return naive(rest, name) or (name[:1] not in ("", "/") and naive(pattern, name[1:]))
    if first == "\\":
        first, rest = rest[0], rest[1:]
        return name[:1] == first and naive(rest, name[1:])
    if first == "?":
        return name[:1] not in ("", "/") and naive(rest, name[1:])
    return name[:1] == first and naive(rest, name[1:])


PATTERNS = st.lists(st.sampled_from(["*", "?", "a", "b", "/", ":", "\\*", "\\a"]), max_size=8).map("".join)


@given(PATTERNS, st.text(alphabet="ab/:*", max_size=10))
def test_as_a_naive_matcher(pattern: str, name: str) -> None:
    assert read_glob(pattern).matches(name) == naive(pattern, name)


def test_many_stars_take_no_time() -> None:
    assert not read_glob("a*" * 200 + "b").matches("a" * 5_000)
