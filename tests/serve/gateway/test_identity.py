"""Whose call it is, as far as headers, body and path say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg import Hints
from orla_lg.serve.gateway.identity import MAX_NAME_CHARS, MAX_TAGS, BadHint, safe_name, source_of
from orla_lg.serve.gateway.settings import SESSION_HEADERS, GatewaySettings

SETTINGS = GatewaySettings()


def source(headers: dict[str, str] | None = None, body: Any = None, path: Any = (None, None)) -> Any:
    said = {name.encode(): value.encode() for name, value in (headers or {}).items()}
    return source_of(said, body or {}, path, SETTINGS)


LADDER: list[tuple[dict[str, str], dict[str, Any], tuple[str | None, str | None]]] = [
    ({"x-orla-workflow-run": "1"}, {}, (None, None)),
    ({}, {"metadata": {"orla.workflow_run": "2"}}, (None, None)),
    ({}, {"metadata": {"orla": {"workflow_run": "3"}}}, (None, None)),
    ({}, {}, ("4", None)),
    *[({name: f"session-{number}"}, {}, (None, None)) for number, name in enumerate(SESSION_HEADERS)],
    ({}, {"metadata": {"user_id": '{"session_id": "5"}'}}, (None, None)),
    ({}, {"program_id": "6"}, (None, None)),
    ({}, {"prompt_cache_key": "7"}, (None, None)),
    ({}, {"nvext": {"agent_context": {"workflow_id": "8"}}}, (None, None)),
    ({"baggage": "a=b,orla.workflow_run=9;ttl=1,orla.stage=plan%20b"}, {}, (None, None)),
]


def merged(one: Any, other: Any) -> Any:
    """Return an object with all of both; the first one's counts."""
    if isinstance(one, dict) and isinstance(other, dict):
        return {key: merged(one.get(key, other.get(key)), other.get(key)) for key in {**other, **one}}
    return one


@pytest.mark.parametrize("rung", range(len(LADDER)))
def test_each_way_to_name_a_workflow_is_stronger_than_those_after_it(rung: int) -> None:
    headers, body, path = LADDER[rung]
    alone = source(headers, body, path).workflow
    assert alone is not None
    for weaker_headers, weaker_body, weaker_path in LADDER[rung + 1 :]:
        both = source(
            {**weaker_headers, **headers}, merged(body, weaker_body),
            path if path != (None, None) else weaker_path,
        )  # fmt: skip
        assert both.workflow == alone


def test_stages() -> None:
    assert source({"x-orla-stage": "a|b"}, {"metadata": {"orla.stage": "c"}}, ("w", "d")).stage == "a|b"
    assert source({}, {"metadata": {"orla.stage": "c", "orla": {"stage": "e"}}}, ("w", "d")).stage == "c"
    assert source({}, {"metadata": {"orla": {"stage": "e"}}}, ("w", "d")).stage == "e"
    assert source({}, {}, ("w", "d")).stage == "d"
    assert source({"baggage": "orla.stage=f"}).stage == "f"
    assert source().stage == "" and source().workflow is None


@pytest.mark.parametrize(
    ("headers", "body", "hints"),
    [
        ({"x-orla-priority": "2.5"}, {}, Hints(priority=2.5)),
        ({"x-orla-cache": "flush", "x-orla-deadline-ms": "1500"}, {}, Hints(cache="flush", deadline_s=1.5)),
        ({"x-orla-deadline-s": "2"}, {}, Hints(deadline_s=2.0)),
        ({"x-orla-mapping": "cheap", "x-orla-tenant": "acme"}, {}, Hints(variant="cheap", tenant="acme")),
        ({}, {"metadata": {"orla.priority": 3, "orla.mapping": "cheap"}}, Hints(priority=3.0, variant="cheap")),
        ({"x-orla-priority": "1"}, {"metadata": {"orla.priority": 3}}, Hints(priority=1.0)),
        ({}, {"metadata": {"orla": {"deadline_ms": 20}}}, Hints(deadline_s=0.02)),
        ({}, {"nvext": {"agent_hints": {"priority": 7}}}, Hints(priority=7.0)),
        ({"x-smg-priority": "Interactive"}, {}, Hints(priority=10.0)),
        ({"x-smg-priority": "whatever"}, {"nvext": {"agent_hints": {"priority": [1]}}}, Hints()),
    ],
)
def test_hints(headers: dict[str, str], body: Any, hints: Hints) -> None:
    assert source(headers, body).hints == hints


def test_tags_are_bounded_and_safe() -> None:
    said = {f"x-orla-tag-key{number}": "v" for number in range(100)} | {"x-orla-tag-odd key": "a\tb"}
    tags = source(said).tags
    assert len(tags) == MAX_TAGS and all(safe_name(key) == key for key in tags)
    assert source({"x-orla-tag-team": "red"}).tags == {"team": "red"}


def test_the_older_form_of_a_claude_session() -> None:
    session = "0c5a6d5e-0000-4000-8000-123456789abc"
    assert source({}, {"metadata": {"user_id": f"user_ab12_account__session_{session}"}}).workflow == session
    assert source({}, {"metadata": {"user_id": "somebody"}}).workflow is None


def test_a_final_call() -> None:
    assert source({"x-dynamo-session-id": "a", "x-dynamo-session-final": "true"}).final
    assert not source({"x-dynamo-session-id": "a", "x-dynamo-session-final": "false"}).final


def test_names_of_others_are_told_apart_whatever_they_hold() -> None:
    odd = ["ä", "ö", "a b", "a  b", "a" * 300, "a" * 301, "\x00", "日本", "\ud800", "a/../b\n"]
    names = [safe_name(each) for each in odd]
    assert len(set(names)) == len(odd)
    assert safe_name("sess_1:a/b@c") == "sess_1:a/b@c" and safe_name(12) == "12"
    assert [safe_name(each) for each in ("", "  ", None, True, 1.5, [], 10**400)] == [None] * 7


@settings(max_examples=50)
@given(st.text() | st.integers() | st.none() | st.booleans())
def test_a_name_is_none_or_safe_and_bounded(value: Any) -> None:
    name = safe_name(value)
    if name is not None:
        assert 0 < len(name) <= MAX_NAME_CHARS and name.isascii() and name.isprintable() and " " not in name
        assert safe_name(name) == name


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("metadata", "nvext", "program_id", "prompt_cache_key", "extra_body")
NAMES = ("baggage", "x-orla-stage", "x-orla-workflow-run", "x-session-id", "x-smg-priority", "x-orla-tag-a")


@settings(max_examples=50)
@given(
    st.dictionaries(st.sampled_from(NAMES).map(str.encode), st.binary(max_size=40)),
    st.dictionaries(st.sampled_from(KEYS), JSON | st.dictionaries(st.sampled_from(("orla", "user_id", "agent_hints",
                    "agent_context", "orla.stage", "orla.priority", "priority", "workflow_id")), JSON)),
)  # fmt: skip
def test_nothing_that_a_request_may_say_breaks_it(headers: dict[bytes, bytes], body: dict[str, Any]) -> None:
    try:
        found = source_of(headers, body, (None, None), SETTINGS)
    except BadHint:
        return
    for name in (found.workflow, found.stage, *found.tags, *found.tags.values()):
        assert not name or (name.isascii() and len(name) <= MAX_NAME_CHARS)
