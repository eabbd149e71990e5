"""The JSON of requests, by orjson where it reads and writes the same as ``json``, which costs ten times as much."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from math import isinf
from typing import Any, NoReturn

import orjson

from orla_lg.clients.backend_request import written as written_slowly
from orla_lg.serve.gateway.answers import RequestRefused

_DIGITS = bytes(each if not 0x30 <= each <= 0x39 else 0x30 for each in range(256))
_LONG = b"0" * 19
"""So many digits may be a whole number beyond 64 bits, of which orjson makes another one."""

_STRICT = orjson.OPT_PASSTHROUGH_SUBCLASS | orjson.OPT_PASSTHROUGH_DATACLASS | orjson.OPT_PASSTHROUGH_DATETIME


def _no_json(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    value = float(text)
    if isinf(value):
        raise ValueError(f"the number {text[:40]} is too large")
    return value


_DECODER = json.JSONDecoder(parse_constant=_no_json, parse_float=_finite)


def parsed(content: bytes) -> dict[str, Any]:
    """Return a request's object.

    Raises:
        RequestRefused: It is none.
    """
    body: Any = None
    if _LONG not in content.translate(_DIGITS):
        with contextlib.suppress(orjson.JSONDecodeError):  # half characters, other encodings; what is wrong: below
            body = orjson.loads(content)
    if body is None:
        try:
            body = _DECODER.decode(content.decode(json.detect_encoding(content), "surrogatepass"))
        except (ValueError, RecursionError) as error:
            raise RequestRefused(400, f"the request's body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestRefused(400, "the request's body must be a JSON object")
    return body


def written(body: Mapping[str, Any]) -> bytes:
    """Return a request's object as bytes, without spaces."""
    try:
        return orjson.dumps(body, option=_STRICT)
    except TypeError:  # whole numbers beyond 64 bits, half characters, deep nesting
        return written_slowly(body)
