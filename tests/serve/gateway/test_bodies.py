"""The gateway's JSON: what orjson reads and writes is what ``json`` would."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.serve.gateway.answers import RequestRefused
from orla_lg.serve.gateway.bodies import parsed, written

NUMBERS = st.one_of(
    st.integers(), st.integers(-(2**70), 2**70), st.floats(allow_nan=False, allow_infinity=False),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, st.text()),
    lambda inner: st.one_of(st.lists(inner), st.dictionaries(st.text(), inner)),
    max_leaves=12,
)


def same(one: Any, other: Any) -> bool:
    """Whether two values are equal and of one type throughout: 1 is not 1.0."""
    return repr(one) == repr(other)


@pytest.mark.hypothesis
@settings(max_examples=40)
@given(st.dictionaries(st.text(), VALUES), st.booleans())
def test_a_body_is_read_and_written_as_json_does(body: dict[str, Any], ascii_only: bool) -> None:
    content = json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert same(parsed(content), body)
    assert same(json.loads(written(body)), body)


@pytest.mark.parametrize(
    "text",
    [
        '{"seed": 18446744073709551616}', '{"seed": -9223372036854775809}', '{"a": [123456789012345678901234]}',
        '{"text": "\\ud800 half"}', '{"a": 1, "a": 2}', '{"a": ' + "[" * 300 + "]" * 300 + "}", '{"a": 1e308}',
    ],
)  # fmt: skip
def test_what_orjson_cannot_hold_is_passed_on_all_the_same(text: str) -> None:
    assert same(parsed(text.encode()), json.loads(text))
    assert same(json.loads(written(parsed(text.encode()))), json.loads(text))


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig", "utf-16-le"])
def test_other_encodings_of_unicode(encoding: str) -> None:
    assert parsed('{"a": "ü"}'.encode(encoding)) == {"a": "ü"}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"a": NaN}', "NaN is no number"), ('{"a": -Infinity}', "no number"), ('{"a": 1e400}', "too large"),
        ("[]", "must be a JSON object"), ("null", "must be a JSON object"), ("{", "is no JSON"), ("", "is no JSON"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "is no JSON"), ('{"a": 01}', "is no JSON"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused_with_what_is_wrong(text: str, why: str) -> None:
    with pytest.raises(RequestRefused, match=why) as refused:
        parsed(text.encode())
    assert refused.value.status == 400


def test_values_that_are_no_json_are_refused_as_by_json() -> None:
    with pytest.raises(TypeError):
        written({"a": object()})
