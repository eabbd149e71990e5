from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from orla_lg.core.call import Ask, Call, Usage
from orla_lg.core.prefetch.prompts import AGAIN_AFTER, AGREED, Prompt, PromptBook, PromptStore, prompt_of
from tests.core.fakes import a_call

SYSTEM = {"role": "system", "content": "Be kind. " * 20}
TOOLS = [{"type": "function", "function": {"name": "search", "description": "finds"}}]


def asking(*said: str, system: dict[str, Any] = SYSTEM, **fields: Any) -> tuple[Call, dict[str, Any]]:
    messages = [system, *({"role": "user", "content": each} for each in said)]
    call = a_call(stage="answer")
    call.standing.graph, call.ask = "graph", Ask("auto", messages, tools="tools" in fields)
    return call, {"model": "m", "messages": messages, "max_tokens": 7, "stream": True, **fields}


def a_prompt(*said: str, **fields: Any) -> Prompt:
    return prompt_of(*asking(*said, **fields))


def test_a_prompt_is_all_that_an_engine_may_render_and_nothing_of_the_answer() -> None:
    call, body = asking("hello", tools=TOOLS, chat_template_kwargs={"thinking": False}, temperature=0.5)
    prompt = prompt_of(call, body)
    assert set(prompt.body) == {"model", "messages", "tools", "chat_template_kwargs"}
    assert prompt.chars > len(SYSTEM["content"]) + len("hello") + len("finds")
    assert prompt.counted(Usage(prompt_tokens=77)).tokens == 77 and prompt.counted(None) is prompt
    body["messages"].append({"role": "user", "content": "more"})
    assert len(prompt.body["messages"]) == 2, "the caller went on with his list"


def test_what_different_workflows_begin_with_is_what_their_stage_begins_with() -> None:
    book = PromptBook(100_000)
    for number in range(AGREED + 1):
        assert book.beginning("graph", "answer") is None
        book.learn(f"w{number}", a_prompt(f"question {number}", tools=TOOLS))
    beginning = book.beginning("graph", "answer")
    assert beginning is not None
    assert beginning.body["messages"] == [SYSTEM] and beginning.body["tools"] == TOOLS
    assert beginning.ask.prefix == a_prompt(tools=TOOLS).ask.prefix and 0 < beginning.tokens < 300
    assert book.beginning("graph", "other") is None


def test_a_workflow_that_goes_on_shows_nothing_of_its_stage() -> None:
    book = PromptBook(100_000)
    for number in range(AGREED + 2):
        book.learn("w", a_prompt("hello", *map(str, range(number))))
    assert book.beginning("graph", "answer") is None


def test_other_tools_or_another_system_prompt_are_learned_anew() -> None:
    for change in ({"tools": TOOLS}, {"system": {"role": "system", "content": "Be quick."}}):
        book = PromptBook(100_000)
        for number in range(AGREED + 1):
            book.learn(f"w{number}", a_prompt(str(number)))
        book.learn("v", a_prompt("x", **change))
        assert book.beginning("graph", "answer") is None
        for number in range(AGREED):
            book.learn(f"u{number}", a_prompt(str(number), **change))
        assert book.beginning("graph", "answer") is not None


def test_a_beginning_that_an_engine_refused_is_left_alone_for_long() -> None:
    book = PromptBook(100_000)
    for number in range(AGREED + AGAIN_AFTER + 1):
        book.learn(f"w{number}", a_prompt(str(number)))
        if book.beginning("graph", "answer") is not None:
            book.unfit(("graph", "answer"))
            refused_at = number
    assert refused_at == AGREED, "and is learned only once more in all these calls"
    for number in range(AGREED):
        book.learn(f"v{number}", a_prompt(str(number)))
    assert book.beginning("graph", "answer") is not None


def test_a_first_call_leaves_only_hashes() -> None:
    book = PromptBook(100_000)
    book.learn("w", a_prompt("my secret"))
    book.learn("v", a_prompt("my other secret"))
    assert book.chars == 0
    assert "secret" not in repr([vars_of(seen) for seen in book._seen.values()])
    assert "secret" not in repr(a_prompt("my secret"))


def vars_of(seen: Any) -> dict[str, Any]:
    return {name: getattr(seen, name) for name in seen.__slots__}


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 60), st.booleans()), max_size=30))
def test_a_shelf_never_holds_more_than_it_may(steps: list[tuple[str, int, bool]]) -> None:
    shelf, kept = PromptStore[str](100), dict[str, int]()
    for key, length, take in steps:
        kept.pop(key, None)
        if take:
            shelf.take(key)
        else:
            prompt = a_prompt("x" * length, system={"role": "user", "content": ""})
            shelf.put(key, prompt)
            if prompt.chars <= 100:
                kept[key] = prompt.chars
            while sum(kept.values()) > 100:
                kept.pop(next(iter(kept)))
        assert shelf.chars == sum(kept.values()) <= 100
        assert {each for each in "abc" if shelf.get(each) is not None} == set(kept)
