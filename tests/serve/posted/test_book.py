"""What was posted, as the store has it: strict, bounded, versioned, and closed where it cannot be read."""

from __future__ import annotations

import json
from typing import Any

import pytest

from orla_lg import ConfigError
from orla_lg.serve.posted import book as book_module
from orla_lg.serve.posted.book import PostedBook, PostedFull
from orla_lg.serve.posted.items import (
    MODELS,
    PostedBackend,
    PostedItem,
    PostedKind,
    PostedMapping,
    PostedPolicy,
    PostedSetting,
    PostedSkill,
    PostedStage,
    PostedWorkflow,
    read_item,
)
from orla_lg.serve.store.store import ABSENT, Conflict, MemoryStore

ITEMS: list[PostedItem] = [
    read_item(PostedBackend, {"name": "light", "endpoint": "http://h/v1", "max_concurrency": 2, "quality": 1}),
    read_item(PostedBackend, {"name": "t", "endpoint": "h", "kind": "tool", "tool_kind": "k", "rates": {"s": 2}}),
    read_item(PostedStage, {"id": "a/b", "backend": "light", "labels": ["pii"], "prompt": "Be brief.\n"}),
    read_item(PostedStage, {"id": "c", "labels": {"owner": {"team": [1, None]}}}),
    read_item(PostedMapping, {"name": "cheap", "overrides": {"a": "light"}}),
    read_item(PostedPolicy, {"name": "p", "subjects": ["*"], "resources": ["data:*"], "action": "deny"}),
    read_item(PostedSkill, {"name": "s", "requires_backends": ["light"]}),
    read_item(
        PostedWorkflow,
        {
            "workflow_id": "w", "edges": [{"from": "a", "to": "b"}],
            "declassifications": [{"stage_id": "b", "labels": ["pii"]}],
        },
    ),
    read_item(PostedSetting, {"name": "stage-mapper", "url": "http://127.0.0.1:1/map"}),
]  # fmt: skip


@pytest.mark.parametrize("item", ITEMS, ids=lambda item: f"{item.kind_}-{item.key}")
def test_what_is_written_is_read(item: PostedItem) -> None:
    store = MemoryStore()
    stored = PostedBook(store, clock=lambda: 5.0).put(item)
    other = PostedBook(store)
    assert other.refresh() and not other.refresh()
    assert other.items.get(type(item), item.key) == stored
    assert (stored.item, stored.created_s, stored.updated_s) == (item, 5.0, 5.0)


def test_every_kind_has_an_example() -> None:
    assert {item.kind_ for item in ITEMS} == set(PostedKind) == set(MODELS)


@pytest.mark.parametrize(
    ("model", "given", "said"),
    [
        (PostedBackend, {"name": "x"}, "endpoint is required"),
        (PostedBackend, {"name": "x", "endpoint": "http://h", "nmae": 1}, "unknown field 'nmae'"),
        (PostedBackend, {"name": "x", "endpoint": "http://h", "max_concurrency": 0}, "max_concurrency"),
        (PostedBackend, {"name": "x", "endpoint": "http://h", "max_concurrency": "3"}, "valid integer"),
        (PostedBackend, {"name": "x", "endpoint": "http://h", "quality": 1.1}, "quality"),
        (PostedBackend, {"name": "auto", "endpoint": "http://h"}, "other than"),
        (
            PostedBackend,
            {"name": "x", "endpoint": "http://h", "rates": {"s": 1}},
            "rates is only valid for kind=tool",
        ),
        (PostedBackend, {"name": "x", "endpoint": "http://h", "kind": "tool"}, "tool_kind is required"),
        (
            PostedBackend,
            {"name": "x", "endpoint": "h", "kind": "tool", "tool_kind": "k", "cost_source": "http://h"},
            "cost_source is only valid for kind=llm",
        ),
        (
            PostedBackend,
            {"name": "x", "endpoint": "h", "kind": "tool", "tool_kind": "k", "rates": {"s": -1}},
            "rates",
        ),
        (PostedStage, {"id": ""}, "id"),
        (PostedStage, {"id": "a\nb"}, "printable"),
        (PostedStage, {"id": "x" * 201}, "id"),
        (PostedStage, {"id": "a", "prompt": "x" * 200_001}, "prompt"),
        (PostedMapping, {"name": "m", "overrides": {}}, "overrides"),
        (PostedMapping, {"name": "m", "overrides": {"a": ""}}, "overrides"),
        (PostedPolicy, {"name": "p", "subjects": ["*"], "resources": ["*"], "action": "maybe"}, "action"),
        (PostedSetting, {"name": "other"}, "name"),
        (PostedWorkflow, {"workflow_id": "w", "edges": [{"from": "a"}]}, "edges.0.to is required"),
    ],
)
def test_what_cannot_be_is_refused_with_its_field(model: type[PostedItem], given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        read_item(model, given)


def test_a_change_is_checked_like_a_new_one() -> None:
    assert ITEMS[0].changed(quality=0.5).model_dump() == {**ITEMS[0].model_dump(), "quality": 0.5}
    with pytest.raises(ConfigError, match="quality"):
        ITEMS[0].changed(quality=2)


def test_a_writer_never_overwrites_what_it_did_not_see() -> None:
    store = MemoryStore()
    one, other = PostedBook(store), PostedBook(store)
    first = one.put(ITEMS[0], expected=ABSENT)
    with pytest.raises(Conflict):
        other.put(ITEMS[0], expected=ABSENT)
    other.put(ITEMS[0].changed(quality=0.5), expected=first.version)
    with pytest.raises(Conflict):
        one.put(ITEMS[0], expected=first.version)
    with pytest.raises(Conflict):
        one.remove(PostedKind.BACKEND, "light", expected=first.version)
    one.remove(PostedKind.BACKEND, "light")
    assert not one.items.of(PostedBackend) and other.refresh() and not other.items.of(PostedBackend)


def test_when_it_was_made_stays() -> None:
    now = [1.0]
    made = PostedBook(MemoryStore(), clock=lambda: now[0])
    made.put(ITEMS[0])
    now[0] = 2.0
    stored = made.put(ITEMS[0])
    assert (stored.created_s, stored.updated_s) == (1.0, 2.0)


def test_number_and_size_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(book_module, "MOST_ITEMS", 2)
    monkeypatch.setattr(book_module, "MOST_BYTES", 1000)
    monkeypatch.setattr(book_module, "MOST_TOTAL_BYTES", 2000)
    made = PostedBook(MemoryStore())
    with pytest.raises(PostedFull, match="at most 1000"):
        made.put(PostedStage(id="a", prompt="x" * 1000))
    made.put(PostedStage(id="a", prompt="x" * 700))
    made.put(PostedStage(id="b", prompt="x" * 700))
    made.put(PostedStage(id="b", prompt="y" * 700))  # another one of its name takes no more room
    with pytest.raises(PostedFull, match="2 stages already"):
        made.put(PostedStage(id="c"))
    with pytest.raises(PostedFull, match="would take"):
        made.put(PostedMapping(name="m", overrides={"a": "b" * 200, "c": "d" * 200, "e": "f" * 200}))


BROKEN = [b"{", b"[]", b"{}", b'"text"', b"\xff", b"9" * 5000]


@pytest.mark.parametrize("kind", PostedKind)
def test_what_cannot_be_read_is_left_out_and_named(kind: PostedKind, caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    good = next(item for item in ITEMS if item.kind_ is kind)
    PostedBook(store).put(good)
    packed = json.loads(store.scan("posted/").popitem()[1].value)
    newer = json.dumps({**packed, "item": {**packed["item"], "from_a_newer_version": 1}}).encode()
    later = json.dumps({**packed, "format": 2}).encode()
    for number, value in enumerate([*BROKEN, newer, later]):
        store.put(f"posted/{kind}/bad{number}", value)
    store.put("posted/unheard-of/x", b"{}")
    made = PostedBook(store)
    made.refresh()
    assert set(made.items.of(type(good))) == {good.key}
    assert made.items.broken(kind) == {f"bad{n}" for n in range(len(BROKEN) + 2)}
    logged = caplog.text.count("cannot be read, and is left out")
    assert logged == len(BROKEN) + 2
    made.refresh()
    assert caplog.text.count("cannot be read, and is left out") == logged  # once


def test_two_say_the_same_whenever_they_were_written() -> None:
    store = MemoryStore()
    made = PostedBook(store)
    made.put(ITEMS[0])
    before = made.items
    made.put(ITEMS[0])
    assert made.items.says_what(before) and made.items != before
    assert before.with_item(ITEMS[0]).says_what(before)
    assert not before.without(PostedKind.BACKEND, "light").says_what(before)
    store.put("posted/stages/bad", b"{}")
    made.refresh()
    assert not made.items.says_what(before)
