"""Whatever is sent to v2's routes, the answer is one of its own, and what is stored can be read."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.serve.posted.book import PostedBook
from orla_lg.serve.posted.items import MODELS
from orla_lg.serve.store.store import MemoryStore
from tests.serve.in_thread import Running, server
from tests.serve.posted.test_applying import ready

FIELDS = sorted(
    {name for model in MODELS.values() for name in model.model_fields} | {"enabled", "cost_model", "stage_id"}
)
PATHS = [
    "backends", "backends/b", "stages", "stages/s", "stages/s/completions", "stages/s/feedback", "mappings",
    "mappings/m", "costs", "costs/policy", "scheduler/policy", "stage-mapper", "workflows/w/completions", "policies",
    "skills", "workflows", "nothing",
]  # fmt: skip

texts = st.sampled_from(["", "b", "llm", "tool", "http://127.0.0.1:9/v1", "x" * 300, "a\nb", "\ud800", "é", "0"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 1 << 70) | st.sampled_from([0.5, -1.0, 1e300]) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
bodies = st.dictionaries(st.sampled_from(FIELDS), values, max_size=6) | values


@pytest.fixture(scope="module")
def running() -> Any:
    with server(store=MemoryStore()) as made:
        yield ready(made)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["GET", "POST", "PUT", "PATCH", "DELETE"]), st.sampled_from(PATHS), bodies)
def test_every_answer_is_one(running: Running, method: str, path: str, body: Any) -> None:
    import json

    content = json.dumps(body).encode()
    answer = httpx.request(
        method,
        f"{running.url}/api/v1/{path}",
        content=content,
        headers={"content-type": "application/json"},
        timeout=10,
    )
    assert answer.status_code < 500, (answer.status_code, answer.text)
    if answer.status_code >= 400:
        assert answer.json()["error"]
    logging.disable(logging.CRITICAL)
    try:
        read = PostedBook(running.server.posted.book._store)
        read.refresh()
    finally:
        logging.disable(logging.NOTSET)
    assert not read.items.unreadable_names and read.items.says_what(running.server.posted.items)
