"""Partial answers of tools: what is final of a result is prefilled while its tool still writes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain.agents import create_agent
from langchain.tools import ToolRuntime
from langchain_core.tools import BaseTool, tool
from langgraph.config import get_stream_writer

from orla_lg import Backend, Orla
from orla_lg.graph.tools.split.next_prompt import PART_CHARS
from tests.tools.prefill_engine import MODEL, PrefillEngine, once
from tests.tools.test_split_prompts import EAGER, QUESTION, Make, Workbench, asked, bench, until

__all__ = ["bench"]

PIECES = [f"Line {nth}: {'foxes jump over lazy dogs ' * 4}\n" for nth in range(60)]
"""Of 110 characters."""

FINAL = {"orla": {"final_prefix": True}}

Hold = Callable[[int], Any]


def by_writer(hold: Hold) -> BaseTool:
    @tool
    def report(query: str) -> str:
        """Report."""
        write = get_stream_writer()
        for nth, piece in enumerate(PIECES):
            write(piece)
            hold(nth)
        return "".join(PIECES)

    return report


def by_runtime(hold: Hold) -> BaseTool:
    @tool
    def report(query: str, runtime: ToolRuntime) -> str:
        """Report."""
        for nth, piece in enumerate(PIECES):
            runtime.stream_writer(piece)
            hold(nth)
        return "".join(PIECES)

    return report


def by_deltas(hold: Hold) -> BaseTool:
    @tool
    def report(query: str, runtime: ToolRuntime) -> str:
        """Report."""
        for nth, piece in enumerate(PIECES):
            runtime.emit_output_delta(piece)
            hold(nth)
        return "".join(PIECES)

    return report


def async_by_writer(hold: Hold) -> BaseTool:
    @tool
    async def report(query: str) -> str:
        """Report."""
        write = get_stream_writer()
        for nth, piece in enumerate(PIECES):
            write(piece)
            await asyncio.to_thread(hold, nth)
        return "".join(PIECES)

    return report


def with_report(work: Workbench, made: BaseTool, **metadata: Any) -> Any:
    made.metadata = metadata
    return create_agent(work.model(), [made])


def at_last(work: Workbench) -> Hold:
    """Hold a tool at its last piece until what is certain by then is prefilled."""
    least_chars = sum(map(len, PIECES)) - PART_CHARS - 200

    def is_there() -> bool:
        said, newest = work.said, work.engine.prefetches[-1:]
        is_long = bool(newest) and len(newest[0].messages[-1]["content"]) > least_chars
        return is_long and said.done > 0 and said.started == said.done + said.given_up + said.failed

    def hold(nth: int) -> None:
        if nth == len(PIECES) - 1:
            assert until(is_there), work.said

    return hold


@pytest.mark.parametrize("make", [by_writer, by_runtime, by_deltas, async_by_writer], ids=lambda each: each.__name__)
def test_what_is_written_is_prefilled_and_passes_as_ever(bench: Callable[..., Workbench], make: Any) -> None:
    work = bench(asked("report"))
    agent = with_report(work, make(at_last(work)), **FINAL)
    wrapped = work.orla.wrap(agent, split_prompts=True)

    async def astream() -> list[Any]:
        return [piece async for piece in wrapped.astream(QUESTION, stream_mode=["custom", "tools"])]

    is_async = make is async_by_writer
    streamed = asyncio.run(astream()) if is_async else list(wrapped.stream(QUESTION, stream_mode=["custom", "tools"]))
    deltas = [said["delta"] for mode, said in streamed if mode == "tools" and said["event"] == "tool-output-delta"]
    assert (deltas or [said for mode, said in streamed if mode == "custom"]) == PIECES
    prefetch, call = work.engine.prefetches[-1], work.engine.calls[-1]
    part, whole = prefetch.messages[-1], call.messages[-1]
    assert whole["content"] == "".join(PIECES)
    assert whole["content"].startswith(part["content"]) and len(part["content"]) > PART_CHARS - 200
    assert not part["content"][-1:].isspace()
    assert {**part, "content": ""} == {**whole, "content": ""} and prefetch.messages[:-1] == call.messages[:-1]
    assert (work.predictions.predicted, work.predictions.held) == (1, 1)
    assert work.said.split_used_tokens > 0.9 * work.said.split_warmed_tokens > 0
    assert call.cached_tokens > 0.8 * len(part["content"]) / 4


def test_one_that_does_not_declare_it_is_not_heard(bench: Callable[..., Workbench]) -> None:
    work = bench(asked("report"))
    work.orla.wrap(with_report(work, by_writer(bool)), split_prompts=True).invoke(QUESTION)
    assert not work.engine.prefetches and work.predictions.held == 1


def test_a_declaration_that_does_not_hold_stops_the_stage(bench: Callable[..., Workbench]) -> None:
    @tool
    def report(query: str) -> str:
        """Report."""
        write = get_stream_writer()
        for piece in PIECES:
            write(piece)
        work.prefilled()
        return "In short: no foxes."

    work = bench(asked("report"))
    final = work.orla.wrap(with_report(work, report, **FINAL), split_prompts=True).invoke(QUESTION)
    assert final["messages"][-2].content == "In short: no foxes."
    (reason,) = work.predictions.stopped.values()
    assert "handed over as final" in reason and work.predictions.held == 0


def test_a_generator_is_what_it_was_without_us(bench: Callable[..., Workbench]) -> None:
    """LangChain shows the model the generator itself, so there is no result to be had in parts."""

    @tool
    def report(query: str) -> Iterator[str]:
        """Report."""
        yield from PIECES

    work = bench(asked("report"))
    final = work.orla.wrap(with_report(work, report, **FINAL), split_prompts=True).invoke(QUESTION)
    assert str(final["messages"][-2].content).startswith("<generator object")


def test_parts_follow_on_the_results_before_them(bench: Callable[..., Workbench]) -> None:
    work = bench(asked("first", "report", "second"))

    def at_last_part(nth: int) -> None:
        if nth == len(PIECES) - 1:
            assert until(lambda: any(len(each.messages) == 4 for each in work.engine.prefetches))

    made = by_writer(at_last_part)
    made.metadata = FINAL
    agent = create_agent(work.model(), [*work.tools, made])
    work.orla.wrap(agent, split_prompts=True).invoke(QUESTION)
    prefetch = next(each for each in work.engine.prefetches if len(each.messages) == 4)
    call = work.engine.calls[-1]
    assert [each.get("tool_call_id") for each in prefetch.messages[2:]] == ["call-0", "call-1"]
    assert prefetch.messages[2] == call.messages[2]
    assert work.predictions.stopped == {}


def test_long_words_are_cut_anywhere(make_orla: Make) -> None:
    @tool
    def report(query: str) -> str:
        """Report."""
        get_stream_writer()("x" * 3 * PART_CHARS)
        work.prefilled()
        return "x" * 4 * PART_CHARS

    with PrefillEngine(once(asked("report"))) as engine:
        backend = Backend("main", engine.url, model=MODEL, engine="vllm")
        work = Workbench(engine, Orla([backend], mapper={"*": "main"}, memory=EAGER))
        work.orla.wrap(with_report(work, report, **FINAL), split_prompts=True).invoke(QUESTION)
        assert len(engine.prefetches[-1].messages[-1]["content"]) == 3 * PART_CHARS - 1
        work.orla.close()
