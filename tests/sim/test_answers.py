"""Made-up answers follow the schemas that they are asked for."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from pydantic import BaseModel, Field, TypeAdapter

from orla_lg_sim.answers import Unanswerable, answer_to, example_of
from orla_lg_sim.text import WordTokenizer


class Leaf(BaseModel):
    name: str = Field(min_length=3, max_length=5)
    size: int = Field(ge=2, lt=9)
    share: float = Field(gt=0, lt=1)


class Tree(BaseModel):
    leaf: Leaf
    children: list[Tree]
    note: str | None
    kind: tuple[int, str]


@pytest.mark.parametrize("wanted", [Leaf, Tree, list[Leaf], dict[str, int], int | None, bool])
def test_pydantic_takes_what_is_made_up_for_its_schema(wanted: Any) -> None:
    adapter: TypeAdapter[Any] = TypeAdapter(wanted)
    adapter.validate_python(example_of(adapter.json_schema()))


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        ({"const": 7}, 7),
        ({"enum": ["x", "y"]}, "x"),
        ({"type": ["string", "null"]}, "text"),
        ({"type": "string", "format": "date"}, "2026-01-01"),
        ({"type": "integer", "exclusiveMinimum": 4, "multipleOf": 5}, 5),
        ({"type": "integer", "minimum": 4, "multipleOf": 3}, 6),
        ({"type": "number", "maximum": -2}, -2),
        ({"type": "array", "items": {"type": "boolean"}, "minItems": 2}, [True, True]),
        ({"type": "array", "items": {"type": "boolean"}, "maxItems": 0}, []),
        ({"allOf": [{"properties": {"a": {"const": 1}}}, {"properties": {"b": {"const": 2}}}]}, {"a": 1, "b": 2}),
        ({}, {}),
        (True, {}),
    ],
)
def test_examples(schema: Any, expected: Any) -> None:
    assert example_of(schema) == expected


def test_a_reference_to_nothing_is_refused() -> None:
    with pytest.raises(Unanswerable, match="does not define"):
        example_of({"$ref": "#/$defs/missing"})


def answer(limit: int = 50, usual: int = 20, **body: Any) -> Any:
    return answer_to(body, WordTokenizer(), Random(1), limit, usual)


def test_an_answer_has_the_length_that_is_asked_for() -> None:
    assert len(answer(limit=9, ignore_eos=True).pieces) == 9
    assert len(answer(usual=5, min_tokens=30).pieces) == 30
    assert answer(limit=2, usual=40).finish_reason == "length"
    assert answer(limit=500).finish_reason == "stop"
    assert answer() == answer(), "the same seed says the same"


def test_a_named_tool_is_called() -> None:
    tools = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]
    assert answer(tools=tools, tool_choice="required").tool == "a"
    assert answer(tools=tools, tool_choice={"function": {"name": "b"}}).tool == "b"
    assert answer(tools=tools, tool_choice="auto").tool is None
    with pytest.raises(Unanswerable, match="none of the tools"):
        answer(tools=tools, tool_choice={"function": {"name": "c"}})
