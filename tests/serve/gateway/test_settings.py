"""``[serve.gateway]``: what may stand there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from orla_lg import ConfigError
from orla_lg.serve.gateway.routes import WIRES
from orla_lg.serve.gateway.settings import SESSION_HEADERS, GatewaySettings


def test_nothing_said_is_the_default() -> None:
    assert GatewaySettings.of({}) == GatewaySettings()
    assert GatewaySettings().session_headers == SESSION_HEADERS


def test_headers_are_kept_in_lower_case() -> None:
    made = GatewaySettings.of({"session_headers": ["X-My-Run"], "session_idle_s": 60, "max_sessions": 5})
    assert made.session_headers == ("x-my-run",) and made.session_idle_s == 60


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ([], "serve.gateway: expected a table"),
        ({"sesion_headers": []}, r"serve.gateway.sesion_headers: unknown key; did you mean 'session_headers'"),
        ({"session_headers": "x-a"}, "serve.gateway.session_headers must be a list of names"),
        ({"session_idle_s": 0}, "serve.gateway.session_idle_s"),
        ({"session_idle_s": True}, "serve.gateway.session_idle_s"),
        ({"max_sessions": 0}, "serve.gateway.max_sessions must be at least 1"),
        ({"max_attempts": 1.5}, "serve.gateway.max_attempts must be a whole number"),
        ({"answer_timeout_s": float("nan")}, "serve.gateway.answer_timeout_s"),
    ],
)
def test_what_is_wrong_is_named(table: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        GatewaySettings.of(table)


def test_the_page_names_every_header_and_field() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "gateway.md").read_text(encoding="utf-8")
    settings = GatewaySettings()
    for name in (*settings.session_headers, *settings.session_fields):
        assert f"`{name}`" in page
    assert all(name in page.lower() for name in settings.final_headers)
    assert all(f"{path}`" in page for path in WIRES)
