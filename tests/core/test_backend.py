from __future__ import annotations

import pytest

from orla_lg.core.backend import Backend, Capability, Cost, Probe, Support
from orla_lg.core.view import served_names
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
