"""What a stand-in answers: a story as long as it may be, or what a schema asks for."""

from __future__ import annotations

import itertools
import json
from typing import Any

_STORY = ["once", "upon", "a", "time", "a", "stone", "lay", "beside", "the", "road", "and", "waited", "for", "rain"]
_VALUES: dict[str, Any] = {"integer": 7, "number": 0.5, "boolean": True, "null": None}
UNBOUND = 12
"""Words of a story that nobody bounds."""


def text_of(message: dict[str, Any]) -> str:
    """Return a message's text."""
    content = message.get("content") or ""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def value_for(schema: dict[str, Any]) -> Any:
    """Return a value that follows a JSON schema."""
    if "enum" in schema:
        return schema["enum"][0]
    kind = schema.get("type")
    if kind == "object":
        return {name: value_for(each) for name, each in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [value_for(schema.get("items") or {})]
    return _VALUES.get(str(kind), "word")


def answer_to(body: dict[str, Any], allowed: int | None) -> tuple[str, str | None]:
    """Return the answer's text, and the function's name if it is the arguments of a call."""
    form = body.get("response_format") or {}
    if form.get("type") == "json_schema":
        return json.dumps(value_for(form["json_schema"]["schema"])), None
    if body.get("tools") and body.get("tool_choice") != "none":
        function = body["tools"][0]["function"]
        return json.dumps(value_for(function.get("parameters") or {"type": "object"})), function["name"]
    return " ".join(itertools.islice(itertools.cycle(_STORY), allowed or UNBOUND)), None
