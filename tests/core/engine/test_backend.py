from __future__ import annotations

import copy
import json
import pickle
import pprint
import traceback
from collections.abc import Callable
from dataclasses import asdict, astuple, fields, replace
from typing import Any

import pytest

from orla_lg.core.boundary.secret import Secret
from orla_lg.core.engine.backend import Backend, Capability, Cost, Probe, Support
from orla_lg.core.placement.view import served_names
from orla_lg.errors import ConfigError

URL = "http://127.0.0.1:1/v1"


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("*", {}, "needs a name other than"),
        ("", {}, "needs a name other than"),
        ("b", {"url": "127.0.0.1:1"}, r"'b': url '127.0.0.1:1' is not http"),
        ("b", {"aliases": "gpt"}, "aliases must be a list"),
        ("b", {"max_concurrency": 0}, "max_concurrency must be at least 1, got 0"),
        ("b", {"capacity": -1}, "capacity must not be negative, got -1"),
        ("b", {"quality": 1.5}, r"quality must lie in \[0, 1\], got 1.5"),
    ],
)
def test_a_backend_that_cannot_be_right(name: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Backend(name, **{"url": URL} | fields)


def test_prices_are_not_negative() -> None:
    with pytest.raises(ConfigError, match=r"-1\.0"):
        Cost(cached_input_per_mtoken=-1.0)


def test_a_key_is_not_shown_and_lists_may_be_lists() -> None:
    backend = Backend("b", URL, api_key="secret", aliases=["gpt"])
    assert "secret" not in repr(backend) and hash(backend)
    assert served_names(backend, Probe(models=("m",))) == ("b", "gpt", "m")


@pytest.mark.parametrize("support", Support)
def test_what_is_not_mentioned_is_assumed(support: Support) -> None:
    probe = Probe(capabilities={Capability.TOOLS: support})
    assert probe.can(Capability.TOOLS) == (support in (Support.NATIVE, Support.EMULATED))
    assert probe.can(Capability.JSON_SCHEMA)


KEYED = Backend("b", URL, "m", "openai", "sk-secret", admin_key="sk-admin")


@pytest.mark.parametrize(
    "show",
    [
        repr, str, asdict, astuple, vars, pprint.pformat, lambda backend: pprint.pformat(vars(backend)),
        lambda backend: json.dumps(asdict(backend)), lambda backend: f"{backend.__dict__}", fields,
        lambda backend: traceback.format_exception(ValueError(backend)),
        lambda backend: json.dumps(vars(backend), default=str),
        lambda backend: f"{Secret('sk-secret')} {Secret('sk-secret')!r} {Secret('sk-secret')!s:>30}",
    ],
)  # fmt: skip
def test_nothing_shows_a_key(show: Callable[[Backend], object]) -> None:
    assert "sk-" not in str(show(KEYED))


@pytest.mark.parametrize("made", [replace(KEYED, url=URL + "/"), copy.copy(KEYED), copy.deepcopy(KEYED), KEYED])
def test_a_key_is_read_as_text_and_goes_where_the_backend_goes(made: Backend) -> None:
    assert (made.api_key, made.admin_key, made.model) == ("sk-secret", "sk-admin", "m")
    assert replace(made, api_key=None).api_key is None and replace(made, api_key="k2").api_key == "k2"
    assert Backend("b", URL).api_key is None


def test_a_key_is_not_pickled_and_not_changed() -> None:
    with pytest.raises(TypeError, match="a key is not pickled"):
        pickle.dumps(KEYED)
    assert pickle.loads(pickle.dumps(Backend("b", URL, "m"))) == Backend("b", URL, "m")
    with pytest.raises(AttributeError):
        KEYED.api_key = "other"  # type: ignore[misc]


@pytest.mark.parametrize("key", ["sk-secret\n", "sk secret", "sk-\u00e9", "\0", 3, b"sk-secret"])
def test_a_key_that_no_header_carries_is_not_shown_either(key: object) -> None:
    with pytest.raises(ConfigError, match=r"backend 'b': api_key (holds|must be)") as raised:
        Backend("b", URL, api_key=key)  # type: ignore[arg-type]
    assert "sk-" not in str(raised.value)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://h:65536/v1", "Port out of range"), ("http://h:-1", "is not http"), ("http:///v1", "is not http"),
        ("http://[::1/v1", "Invalid IPv6"), ("http://u:hidden@h/v1", "without a user's name"),
        ("http://h /v1", "is not http"), ("http://h\n/v1", "control characters"), ("http://\ud800/", "surrogate"),
        ("http://a..b/", "is not http"), (None, "must be a text"), ("http://h:0/v1", "no server has port 0"),
    ],
)  # fmt: skip
def test_a_url_that_no_client_opens(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"backend 'b': url .*{message}") as raised:
        Backend("b", url)
    assert "hidden" not in str(raised.value)


@pytest.mark.parametrize("number", [2**63 - 1, True, "8", 8.0, float("nan")])
def test_what_is_kept_on_disk_is_bounded(number: Any) -> None:
    with pytest.raises(ConfigError, match=r"backend 'b': max_saved must be (at most 10000|a whole number), got"):
        Backend("b", URL, max_saved=number)
