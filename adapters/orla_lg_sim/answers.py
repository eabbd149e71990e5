"""What the simulated model says: words, or JSON that follows a schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

from orla_lg_sim.text import Tokenizer, prose

_DEEPEST = 6
"""Where a schema refers to itself, what may be left out is left out from this depth on."""

_FORMATS = {
    "date-time": "2026-01-01T00:00:00Z",
    "date": "2026-01-01",
    "time": "00:00:00Z",
    "email": "a@example.com",
    "uri": "https://example.com",
    "uuid": "00000000-0000-4000-8000-000000000000",
    "ipv4": "127.0.0.1",
}


class Unanswerable(ValueError):
    """A request asks for what cannot be made up."""


@dataclass(frozen=True, slots=True)
class SimulatedAnswer:
    """What will be said, a piece for each token."""

    pieces: tuple[str, ...]
    finish_reason: str
    tool: str | None = None
    """The function that is called, with the pieces as its arguments."""


def answer_to(
    body: Mapping[str, Any], tokenizer: Tokenizer, random: Random, limit: int, usual: int
) -> SimulatedAnswer:
    """Make up the answer to a chat completion.

    Args:
        body: The request.
        tokenizer: Cuts JSON into tokens.
        random: For the words, and for how many there are.
        limit: The most tokens there may be.
        usual: How many tokens an answer has in the middle, where nothing says how many.

    Raises:
        Unanswerable: A schema or a tool choice is wrong.
    """
    if (called := _called_function(body)) is not None:
        text = json.dumps(example_of(called.get("parameters") or {}))
        return _cut(tokenizer.pieces(text), limit, "tool_calls", str(called.get("name")))
    if (schema := _wanted_schema(body)) is not None:
        return _cut(tokenizer.pieces(json.dumps(example_of(schema))), limit, "stop")
    if body.get("ignore_eos"):
        return SimulatedAnswer(tuple(prose(random, limit)), "length")
    least = int(body.get("min_tokens") or 1)
    length = max(least, round(random.lognormvariate(0.0, 0.5) * usual), 1)
    return _cut(prose(random, min(length, limit + 1)), limit, "stop")


def _cut(pieces: list[str], limit: int, reason: str, tool: str | None = None) -> SimulatedAnswer:
    if len(pieces) > limit:
        return SimulatedAnswer(tuple(pieces[:limit]), "length", tool)
    return SimulatedAnswer(tuple(pieces), reason, tool)


def _called_function(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the function that must be called; ``None`` if none must."""
    choice, tools = body.get("tool_choice"), body.get("tools") or ()
    if choice in (None, "none", "auto"):
        return None
    functions = [tool.get("function") or {} for tool in tools if isinstance(tool, Mapping)]
    if choice == "required":
        if not functions:
            raise Unanswerable("tool_choice 'required' needs tools")
        return functions[0]
    wanted = (choice.get("function") or {}).get("name") if isinstance(choice, Mapping) else None
    for function in functions:
        if function.get("name") == wanted:
            return function
    raise Unanswerable(f"tool_choice {choice!r} names none of the tools")


def _wanted_schema(body: Mapping[str, Any]) -> Mapping[str, Any] | None:
    form = body.get("response_format")
    if form is None:
        return None
    kind = form.get("type") if isinstance(form, Mapping) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": "object"}
    schema = (form.get("json_schema") or {}).get("schema") if kind == "json_schema" else None
    if not isinstance(schema, Mapping):
        raise Unanswerable(f"response_format {form!r} is none of text, json_object, json_schema with a schema")
    return schema


def example_of(schema: Any) -> Any:
    """Return a value that *schema* allows; ``pattern`` and ``not`` are not heeded.

    Raises:
        Unanswerable: It refers to what it does not define.
    """
    return _example(schema, schema, 0)


def _example(schema: Any, root: Any, depth: int) -> Any:
    if schema is True or not isinstance(schema, Mapping):
        return {}
    if "$ref" in schema:
        return _example(_resolve(str(schema["$ref"]), root), root, depth + 1)
    if "const" in schema:
        return schema["const"]
    if schema.get("enum"):
        return schema["enum"][0]
    if parts := schema.get("allOf"):
        return _example(_merged(parts, {k: v for k, v in schema.items() if k != "allOf"}, root), root, depth)
    for key in ("anyOf", "oneOf"):
        if options := schema.get(key):
            return _example(_simplest(options, depth), root, depth + 1)
    return _typed(schema, root, depth)


def _typed(schema: Mapping[str, Any], root: Any, depth: int) -> Any:
    kind = schema.get("type")
    kind = kind[0] if isinstance(kind, list) and kind else kind
    if kind == "object" or "properties" in schema:
        return _object(schema, root, depth)
    if kind == "array" or "items" in schema:
        return _array(schema, root, depth)
    if kind in ("integer", "number"):
        return _number(schema, whole=kind == "integer")
    if kind == "string":
        return _string(schema)
    return {"boolean": True, "null": None}.get(str(kind), {})


def _object(schema: Mapping[str, Any], root: Any, depth: int) -> dict[str, Any]:
    properties = schema.get("properties") or {}
    required = schema.get("required") or ()
    wanted = [name for name in properties if depth < _DEEPEST or name in required]
    made = {name: _example(properties[name], root, depth + 1) for name in wanted if depth < 4 * _DEEPEST}
    return made | {name: {} for name in required if name not in properties}


def _array(schema: Mapping[str, Any], root: Any, depth: int) -> list[Any]:
    least, most = int(schema.get("minItems", 0)), int(schema.get("maxItems", 1))
    first = list(schema.get("prefixItems") or ())
    count = max(least, len(first), 1 if depth < _DEEPEST and most else 0)
    schemas = [*first, *[schema.get("items", {"type": "string"})] * (count - len(first))]
    return [_example(item, root, depth + 1) for item in schemas[:count]]


def _number(schema: Mapping[str, Any], *, whole: bool) -> float | int:
    step = schema.get("multipleOf") or 1
    least = schema.get("minimum", schema.get("exclusiveMinimum"))
    most = schema.get("maximum", schema.get("exclusiveMaximum"))
    value = least if least is not None else min(0, most) if most is not None else 0
    if whole or "multipleOf" in schema:
        value = -(-value // step) * step
    if value == schema.get("exclusiveMinimum"):
        value = (
            (value + schema["exclusiveMaximum"]) / 2 if not whole and "exclusiveMaximum" in schema else value + step
        )
    if value == schema.get("exclusiveMaximum"):
        value -= step
    return int(value) if whole else value


def _string(schema: Mapping[str, Any]) -> str:
    text = _FORMATS.get(str(schema.get("format")), "text")
    least, most = int(schema.get("minLength", 0)), schema.get("maxLength")
    text = text.ljust(least, "x")
    return text if most is None else text[: int(most)]


def _simplest(options: Any, depth: int) -> Any:
    """Return the option to take; deep inside a schema one that does not lead deeper."""
    if depth < _DEEPEST:
        return options[0]
    flat = [option for option in options if isinstance(option, Mapping) and option.get("type") == "null"]
    flat += [option for option in options if isinstance(option, Mapping) and "$ref" not in option]
    return (flat or options)[0]


def _merged(parts: Any, rest: Mapping[str, Any], root: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    for part in (*parts, rest):
        whole = _resolve(str(part["$ref"]), root) if isinstance(part, Mapping) and "$ref" in part else part
        for key, value in whole.items():
            if key == "properties":
                merged[key] = {**merged.get(key, {}), **value}
            elif key == "required":
                merged[key] = [*merged.get(key, ()), *value]
            else:
                merged[key] = value
    return merged


def _resolve(reference: str, root: Any) -> Any:
    found = root
    for part in reference.removeprefix("#").strip("/").split("/"):
        if not part:
            continue
        name = part.replace("~1", "/").replace("~0", "~")
        if not isinstance(found, Mapping) or name not in found:
            raise Unanswerable(f"the schema refers to {reference!r}, which it does not define")
        found = found[name]
    return found
