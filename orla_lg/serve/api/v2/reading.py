"""What v2's requests say: their bodies, their times, their limits."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from starlette.requests import Request

from orla_lg.errors import did_you_mean, shown
from orla_lg.serve.api.v2.errors import wrong
from orla_lg.serve.gateway.bodies import parsed

LIMIT, MOST_LIMIT = 100, 1000


async def body_of(request: Request) -> dict[str, Any]:
    """Return a request's object.

    Raises:
        RequestRefused: It is none.
    """
    return parsed(await request.body())


def given(body: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of an object that are not null.

    Raises:
        RequestRefused: One of them is not known.
    """
    for name in body:
        if name not in known:
            raise wrong(f"unknown field {shown(name)}{did_you_mean(name, known)}")
    return {name: value for name, value in body.items() if value is not None}


def since(request: Request) -> float:
    """Return the moment that ``?since=`` names, in seconds since 1970; 0 where none is named.

    Raises:
        RequestRefused: It is none.
    """
    said = request.query_params.get("since", "")
    if not said:
        return 0.0
    try:
        moment = datetime.fromisoformat(said.replace(" ", "+"))  # a plus that a query spells as a space
        if moment.tzinfo is None or "T" not in said.upper():
            raise ValueError(said)
        return moment.timestamp()
    except (ValueError, OverflowError):
        raise wrong(f"since must be an RFC 3339 timestamp, as 2026-01-02T15:04:05Z; got {shown(said)}") from None


def limit(request: Request) -> int:
    """Return what ``?limit=`` says; more than there may be is as much as there may be.

    Raises:
        RequestRefused: It is no number, or below 1.
    """
    said = request.query_params.get("limit", "")
    if not said:
        return LIMIT
    if not (said.isascii() and said.isdecimal() and int(said[:9]) >= 1):
        raise wrong(f"limit must be a whole number, 1 or more; got {shown(said)}")
    return min(int(said[:9]), MOST_LIMIT)
