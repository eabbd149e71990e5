"""What tests of the wires draw from: texts, JSON of any kind, and objects under names that mean something."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

TEXTS = st.text(min_size=1, max_size=12)
NAMES = st.from_regex(r"[a-z_]{1,12}", fullmatch=True)
LEAVES = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | st.text(max_size=6)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
OBJECTS = st.dictionaries(st.text(max_size=4), VALUES, max_size=3)
ANYTHING = st.recursive(
    LEAVES | st.floats(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


def named(*names: str) -> st.SearchStrategy[Any]:
    """Return objects of anything under names that mean something."""
    return st.dictionaries(st.sampled_from(names), ANYTHING | st.sampled_from(names), max_size=5)
