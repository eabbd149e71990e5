"""Where a call of the gateway comes from: what its headers, its body and its path say of workflow, stage and hints.

Strongest first: Orla's own headers, the body's ``metadata``, the path's prefix, the session headers of coding agents
and other routers, fields of the body that name a session, W3C baggage. A call of which none says anything is a
workflow of its own. Every name is bounded, and of characters that logs, records and metrics can carry.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from hashlib import blake2b
from types import MappingProxyType
from typing import Any
from urllib.parse import unquote

from orla_lg.core.call import NO_HINTS, Hints
from orla_lg.core.guard.flow import NONE
from orla_lg.core.guard.labels import label_names
from orla_lg.errors import ConfigError, OrlaError, shown
from orla_lg.serve.gateway.settings import GatewaySettings
from orla_lg.wires.reading import is_number

MAX_NAME_CHARS = 200
MAX_TAGS = 32
MAX_BAGGAGE_CHARS = 8192
MAX_FOREIGN_PRIORITY = 1e9

_SAFE = re.compile(rf"[A-Za-z0-9._:@/+=|~-]{{1,{MAX_NAME_CHARS}}}")
_UNSAFE = re.compile(r"[^A-Za-z0-9._:@/+=|~-]+")
_KEPT_CHARS = 64

_ORLA = b"x-orla-"
_TAG = "tag-"
_CLAUDE_SESSION = re.compile(r"_session_([0-9A-Fa-f-]{8,64})\Z")
_SMG_PRIORITIES = {"bulk": -10.0, "default": 0.0, "interactive": 10.0, "system": 20.0}
_SAID_FINAL = frozenset({"1", "true", "yes"})
_NO_TAGS: Mapping[str, str] = MappingProxyType({})


class BadHint(OrlaError):
    """An Orla header, or an Orla key in the body's metadata, says what cannot be."""


@dataclass(frozen=True, slots=True)
class CallSource:
    """What a request says of where it comes from."""

    workflow: str | None = None
    """``None``: the call is a workflow of its own."""
    stage: str = ""
    hints: Hints = NO_HINTS
    tags: Mapping[str, str] = field(default_factory=lambda: _NO_TAGS)
    final: bool = False
    """The session ends with this call."""
    labels: frozenset[str] = frozenset()
    """Of the call's data, as its caller claims."""


def safe_name(value: object) -> str | None:
    """Return a name in bounded length and safe characters; ``None`` where it is none.

    One that is too long or holds others is shortened, and told apart from its like by a hash of the whole.
    """
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if value.bit_length() < MAX_NAME_CHARS else None
    if not isinstance(value, str) or not (value := value.strip()):
        return None
    if _SAFE.fullmatch(value):
        return value
    hashed = blake2b(value.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()
    return f"{_UNSAFE.sub('-', value[:_KEPT_CHARS])}~{hashed}"


def source_of(
    headers: Mapping[bytes, bytes],
    body: Mapping[str, Any],
    path: tuple[str | None, str | None],
    settings: GatewaySettings,
) -> CallSource:
    """Return where a request comes from.

    Args:
        headers: By their names in lower case.
        body: The request's object.
        path: Workflow and stage as the path's prefix names them.
        settings: Which headers and fields name sessions.

    Raises:
        BadHint: What Orla's own headers or keys say cannot be.
    """
    said = {_text(name[len(_ORLA) :]): _text(value) for name, value in headers.items() if name.startswith(_ORLA)}
    metadata = body.get("metadata")
    beside = _in_metadata(metadata) if isinstance(metadata, Mapping) and metadata else {}
    baggage = _baggage(headers[b"baggage"]) if b"baggage" in headers else {}
    workflow = (
        safe_name(said.get("workflow-run"))
        or safe_name(beside.get("workflow_run") or beside.get("workflow"))
        or safe_name(path[0])
        or _session(headers, body, settings)
        or safe_name(baggage.get("orla.workflow_run") or baggage.get("session.id"))
    )
    stage = (
        safe_name(said.get("stage"))
        or safe_name(beside.get("stage"))
        or safe_name(path[1])
        or safe_name(baggage.get("orla.stage"))
    )
    hints = NO_HINTS
    if not (_HINT_HEADERS.isdisjoint(said) and _HINT_KEYS.isdisjoint(beside)):
        hints = _hints(said, beside)
    if hints.priority is None and (b"x-smg-priority" in headers or "nvext" in body):
        hints = hints.over(_foreign_hints(headers, body))
    tags = _tags(said, beside) if said or beside else _NO_TAGS
    labels = _labels(said, beside) if "labels" in said or "labels" in beside else NONE
    final = any(_is_said(headers[name]) for name in encoded(settings.final_headers) if name in headers)
    return CallSource(workflow, stage or "", hints, tags, final, labels)


@lru_cache(maxsize=64)
def encoded(names: tuple[str, ...]) -> tuple[bytes, ...]:
    """Return the names of headers as requests have them."""
    return tuple(name.encode("latin-1", "replace") for name in names)


def _is_said(value: bytes) -> bool:
    return _text(value).strip().lower() in _SAID_FINAL


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")


def _in_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what Orla's keys say, dotted (``orla.stage``) or nested (``orla: {stage}``); dotted ones win."""
    nested = metadata.get("orla")
    found = {str(name): value for name, value in nested.items()} if isinstance(nested, Mapping) else {}
    for name, value in metadata.items():
        if isinstance(name, str) and name.startswith("orla."):
            found[name[5:]] = value
    return found


def _session(headers: Mapping[bytes, bytes], body: Mapping[str, Any], settings: GatewaySettings) -> str | None:
    for name in encoded(settings.session_headers):
        if (value := headers.get(name)) and (named := safe_name(_text(value))):
            return named
    metadata = body.get("metadata")
    if isinstance(metadata, Mapping) and (named := _claude_session(metadata.get("user_id"))):
        return named
    extra = body.get("extra_body")
    for field_name in settings.session_fields:
        named = safe_name(body.get(field_name))
        if named is None and isinstance(extra, Mapping):
            named = safe_name(extra.get(field_name))
        if named is not None:
            return named
    context = _nvext(body, "agent_context")
    return safe_name(context.get("workflow_id")) or safe_name(context.get("program_id"))


def _claude_session(user_id: object) -> str | None:
    """Return the session in the ``metadata.user_id`` of Claude Code: JSON as a text, or the end of a name."""
    if not isinstance(user_id, str) or len(user_id) > MAX_BAGGAGE_CHARS:
        return None
    if user_id.startswith("{"):
        try:
            said = json.loads(user_id)
        except (ValueError, RecursionError):
            return None
        return safe_name(said.get("session_id")) if isinstance(said, Mapping) else None
    found = _CLAUDE_SESSION.search(user_id)
    return None if found is None else found[1]


def _nvext(body: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    nvext = body.get("nvext")
    said = nvext.get(key) if isinstance(nvext, Mapping) else None
    return said if isinstance(said, Mapping) else {}


def _baggage(value: bytes) -> dict[str, str]:
    found: dict[str, str] = {}
    for member in _text(value[:MAX_BAGGAGE_CHARS]).split(","):
        name, equals, said = member.partition(";")[0].partition("=")
        if equals:
            found[name.strip()] = unquote(said.strip())
    return found


def _tags(said: Mapping[str, str], beside: Mapping[str, Any]) -> Mapping[str, str]:
    tags: dict[str, str] = {}
    nested = beside.get("tags")
    dotted = {name[5:]: value for name, value in beside.items() if name.startswith("tags.")}
    listed = [*(nested.items() if isinstance(nested, Mapping) else ()), *dotted.items()]
    listed += [(name[len(_TAG) :], value) for name, value in said.items() if name.startswith(_TAG)]
    for name, value in listed[-MAX_TAGS:]:
        key, text = safe_name(name), safe_name(value)
        if key is not None and text is not None:
            tags[key] = text
    return tags or _NO_TAGS


def _labels(said: Mapping[str, str], beside: Mapping[str, Any]) -> frozenset[str]:
    """Return the labels that a caller claims: all that headers and metadata name, since they only add."""
    found: list[Any] = []
    for value in (said.get("labels"), beside.get("labels")):
        if isinstance(value, str):
            found += [each.strip() for each in value.split(",") if each.strip()]
        elif isinstance(value, list):
            found += value
        elif value is not None:
            raise BadHint(f"labels must be a list of names, or a text of names with commas, got {shown(value)}")
    try:
        return label_names("labels", found)
    except ConfigError as error:
        raise BadHint(f"{error}") from error


# Hints


_HINT_HEADERS = frozenset({"priority", "deadline-ms", "deadline-s", "cache", "mapping", "tenant"})
_HINT_KEYS = frozenset({name.replace("-", "_") for name in _HINT_HEADERS})


def _hints(said: Mapping[str, str], beside: Mapping[str, Any]) -> Hints:
    priority = _number("priority", said, beside)
    deadline_ms = _number("deadline-ms", said, beside)
    deadline_s = _number("deadline-s", said, beside) if deadline_ms is None else deadline_ms / 1000
    cache, variant = _word("cache", said, beside), _word("mapping", said, beside)
    tenant = safe_name(_word("tenant", said, beside))
    try:
        return Hints(priority, cache, deadline_s, tenant, variant)  # type: ignore[arg-type]  # it looks itself
    except ConfigError as error:
        raise BadHint(f"{error}") from error


def _said(name: str, said: Mapping[str, str], beside: Mapping[str, Any]) -> tuple[str, Any]:
    if name in said:
        return f"header X-Orla-{name.title()}", said[name]
    key = name.replace("-", "_")
    return f"metadata key 'orla.{key}'", beside.get(key)


def _number(name: str, said: Mapping[str, str], beside: Mapping[str, Any]) -> float | None:
    where, value = _said(name, said, beside)
    if value is None or value == "":
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadHint(f"{where} must be a number, got {shown(value)}") from None


def _word(name: str, said: Mapping[str, str], beside: Mapping[str, Any]) -> str | None:
    where, value = _said(name, said, beside)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > MAX_NAME_CHARS:
        raise BadHint(f"{where} must be a text of at most {MAX_NAME_CHARS} characters, got {shown(value)}")
    return value


def _foreign_hints(headers: Mapping[bytes, bytes], body: Mapping[str, Any]) -> Hints:
    """Return the priority as other routers say it, where it is one; what is wrong with it is not ours to refuse."""
    if (named := headers.get(b"x-smg-priority")) is not None:
        return Hints(priority=_SMG_PRIORITIES.get(_text(named).strip().lower()))
    value = _nvext(body, "agent_hints").get("priority")
    return Hints(priority=float(value)) if is_number(value) and abs(value) < MAX_FOREIGN_PRIORITY else NO_HINTS
