"""What is passed on is always a beginning of the prompt that comes, or the stage stops; and nothing is left."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.messages import AIMessage, ToolMessage
from langchain_core.tools import StructuredTool
from langchain_openai.chat_models.base import _convert_dict_to_message, _convert_message_to_dict
from langgraph.types import Command

from orla_lg.core.call import Ask
from orla_lg.core.identity import Identity
from orla_lg.core.memory.events import SplitPrompt
from orla_lg.graph.tools.early.starts import AskingCall, EarlyStart
from orla_lg.graph.tools.split import next_prompt
from orla_lg.graph.tools.split.next_prompt import AGAIN_AFTER, NextPrompts
from tests.core.fakes import a_call

HELLO = {"role": "user", "content": "hello"}


class Fakes:
    """A core that notes what it is asked to keep."""

    def __init__(self, *, keeps: bool = True) -> None:
        self.next_prompts = NextPrompts()
        self.now, self.keeps = 0.0, keeps
        self.open = {"run"}
        self.kept: list[SplitPrompt] = []
        self.calls = 0
        self.serving: Any = SimpleNamespace(
            clock=lambda: self.now,
            book=SimpleNamespace(run=lambda run: run if run in self.open else None),
            progress=SimpleNamespace(prompt_split=self._keep),
        )

    def _keep(self, run: str, split: SplitPrompt) -> bool:
        self.kept.append(split)
        return self.keeps

    def answered(
        self, messages: Sequence[Any], message: Any, *, run: str = "run", within: str = "", stage: str = "model",
        backend: str | None = "main", starts: Sequence[EarlyStart] = (),
    ) -> str:  # fmt: skip
        self.calls += 1
        call = a_call("w")
        call.id, call.identity = (
            f"c{self.calls}",
            Identity("w", run, stage, namespace=f"{within}{stage}:{self.calls}"),
        )
        call.ask = Ask("m", list(messages))
        inflight: Any = SimpleNamespace(call=call, backend=backend, external=backend is None)
        self.next_prompts.answered(self.serving, inflight, message, starts)
        return call.id

    def starts(self, call_id: str | None, name: str = "look", inputs: Any = None, run: str = "run") -> Any:
        tool_run = uuid4()
        self.next_prompts.tool_started(self.serving, run, tool_run, name, call_id, inputs)
        return tool_run

    def ends(self, tool_run: Any, output: Any = None) -> None:
        self.next_prompts.tool_ended(self.serving, tool_run, output)


def answer(*ids: str, **more: Any) -> dict[str, Any]:
    calls = [
        {"id": each, "type": "function", "function": {"name": "look", "arguments": json.dumps({"x": each})}}
        for each in ids
    ]
    return {"role": "assistant", "content": None, "tool_calls": calls, **more}


def written(message: dict[str, Any], **changed: Any) -> dict[str, Any]:
    made = _convert_dict_to_message(message)
    return _convert_message_to_dict(made.model_copy(update=changed))


def result(call_id: str, text: str = "found") -> ToolMessage:
    return ToolMessage(text, tool_call_id=call_id)


OUTPUTS = st.sampled_from(["text", "", "ünïcode " * 50, ["a", "b"], [{"type": "text", "text": "block"}], None])


@settings(max_examples=120, deadline=None)
@given(
    outputs=st.lists(OUTPUTS, min_size=1, max_size=5),
    order=st.randoms(use_true_random=False),
    parts=st.lists(st.text("ab \n", max_size=5000), max_size=3),
)
def test_what_is_passed_on_is_a_beginning_in_call_order(outputs: list[Any], order: Any, parts: list[str]) -> None:
    fakes, ids = Fakes(), [f"t{nth}" for nth in range(len(outputs))]
    message = answer(*ids)
    fakes.answered([HELLO], message)
    runs = {call_id: fakes.starts(call_id) for call_id in order.sample(ids, len(ids))}
    for part in parts:  # of the first tool, which ends with them as its beginning
        fakes.next_prompts.tool_wrote(fakes.serving, runs[ids[0]], part)
    finals: dict[str, Any] = {}
    for call_id in order.sample(ids, len(ids)):
        output = outputs[ids.index(call_id)]
        if call_id == ids[0] and parts:
            output = "".join(parts) + "end"
        failed = output is None
        fakes.ends(runs[call_id], None if failed else ToolMessage(output, tool_call_id=call_id))
        content = output if isinstance(output, str | None) or isinstance(output[0], dict) else json.dumps(output)
        finals[call_id] = _convert_message_to_dict(ToolMessage(content or "", tool_call_id=call_id))
    real = [HELLO, written(message), *(finals[call_id] for call_id in ids)]
    for split in fakes.kept:
        following = real[1 : 1 + len(split.messages)]
        whole = split.messages[:-1] if split.partly else split.messages
        assert following[: len(whole)] == list(whole)
        if split.partly:
            assert following[-1]["content"].startswith(split.messages[-1]["content"])
        assert split.results == len(split.messages) - 1
    lengths = [(each.results - each.partly, each.partly) for each in fakes.kept]
    assert lengths == sorted(lengths), "less never follows on more"
    assert all(each.running for each in fakes.kept), "with the last tool the call itself comes"
    fakes.answered(real, {"role": "assistant", "content": "done"})
    said = fakes.next_prompts.statistics()
    assert (said.predicted, said.held, said.stopped) == (said.held, said.held, {})
    assert len(fakes.next_prompts) == 0 and not fakes.next_prompts._tools
    fakes.next_prompts.check_integrity()


@pytest.mark.parametrize(
    ("real", "why"),
    [
        (lambda sent, said, found: [said, found], "do not begin"),
        (lambda sent, said, found: [sent, found], "answer"),
        (lambda sent, said, found: [sent, {**said, "content": "hm"}, found], "answer"),
        (lambda sent, said, found: [sent, said, {**found, "content": "cut"}], "result"),
        (lambda sent, said, found: [sent, said], "result"),
    ],
)
def test_a_stage_that_differs_stops_and_is_tried_again_later(real: Any, why: str) -> None:
    fakes = Fakes()

    def a_round() -> int:
        before = len(fakes.kept)
        message = answer("t0", "t1")
        fakes.answered([HELLO], message)
        runs = [fakes.starts("t0"), fakes.starts("t1")]
        fakes.ends(runs[0], result("t0"))
        body = real(HELLO, written(message), _convert_message_to_dict(result("t0")))
        fakes.ends(runs[1], result("t1"))
        fakes.answered(body, {"role": "assistant", "content": "done"})
        fakes.next_prompts.run_ended("run")
        return len(fakes.kept) - before

    assert a_round() == 2
    (reason,) = fakes.next_prompts.statistics().stopped.values()
    assert why in reason
    assert [a_round() for _ in range(AGAIN_AFTER)] == [0] * AGAIN_AFTER
    assert fakes.next_prompts.statistics().stopped == {}
    assert a_round() == 2


def test_calls_that_bring_nothing_to_await() -> None:
    fakes = Fakes()
    fakes.answered([HELLO], None)
    fakes.answered([HELLO], {"role": "assistant", "content": "hi"})
    fakes.answered([HELLO], answer("t0"), backend=None)
    fakes.answered([HELLO], answer("t0", "t0"))
    fakes.answered([HELLO], answer("", "t1"))
    fakes.answered([HELLO], answer(*(f"t{nth}" for nth in range(200))))
    fakes.answered([HELLO], {"role": "assistant", "tool_calls": [7]})
    fakes.answered([HELLO], answer("t0"), run="over")
    assert len(fakes.next_prompts) == 0
    fakes.next_prompts.check_integrity()


def test_tools_that_are_none_of_an_answers_and_ends_that_nothing_began() -> None:
    fakes = Fakes()
    fakes.answered([HELLO], answer("t0", "t1"))
    fakes.ends(fakes.starts("other"), result("other"))
    fakes.ends(uuid4(), result("t0"))
    fakes.ends(fakes.starts("t0", run="another"), result("t0"))
    assert not fakes.kept
    first = fakes.starts("t0")
    fakes.ends(first, Command(update={}))
    assert len(fakes.kept) == 1, "the answer alone; what a command leads to is not known"
    again = fakes.starts("t0")
    fakes.ends(again, result("t0"))
    assert fakes.kept[-1].results == 1, "one that failed and is tried again"


def test_a_tool_that_is_called_without_its_calls_id_is_known_by_name_and_arguments() -> None:
    fakes = Fakes()
    fakes.answered([HELLO], answer("t0", "t1"))
    other, second, first = (
        fakes.starts(None, inputs={"x": "t9"}), fakes.starts(None, inputs={"x": "t1"}),
        fakes.starts(None, inputs={"x": "t0"}),
    )  # fmt: skip
    fakes.ends(other, "none")
    fakes.ends(first, "one")
    assert fakes.kept[-1].messages[1:] == [{"content": "one", "role": "tool", "tool_call_id": "t0"}]
    fakes.ends(second, {"not": "text"})


def test_where_the_core_keeps_nothing_it_is_not_asked_again() -> None:
    fakes = Fakes(keeps=False)
    fakes.answered([HELLO], answer("t0", "t1"))
    runs = [fakes.starts("t0"), fakes.starts("t1")]
    fakes.ends(runs[0], result("t0"))
    assert len(fakes.kept) == 1


def test_branches_beside_each_other_are_held_against_their_own() -> None:
    fakes = Fakes()
    one, other = [{**HELLO, "content": "one"}], [{**HELLO, "content": "other"}]
    for sent, call_id in ((one, "a"), (other, "b")):
        fakes.answered(sent, answer(call_id, f"{call_id}2"))
        fakes.ends(fakes.starts(call_id), result(call_id))
        fakes.ends(fakes.starts(f"{call_id}2"), result(f"{call_id}2"))
    for sent, call_id in ((other, "b"), (one, "a")):
        results = [_convert_message_to_dict(result(each)) for each in (call_id, f"{call_id}2")]
        fakes.answered([*sent, written(answer(call_id, f"{call_id}2")), *results], {"role": "assistant"})
    assert fakes.next_prompts.statistics().held == 2 and len(fakes.next_prompts) == 0


def test_what_is_awaited_is_bounded_and_goes_with_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(next_prompt, "KEEP_AWAITED", 5)
    fakes = Fakes()
    fakes.open = {f"r{nth}" for nth in range(20)}
    for nth in range(20):
        fakes.answered([HELLO], answer("t0"), run=f"r{nth}")
        fakes.starts("t0", run=f"r{nth}")
        fakes.next_prompts.check_integrity()
    assert len(fakes.next_prompts) == 5
    for nth in range(20):
        fakes.next_prompts.run_ended(f"r{nth}")
    assert len(fakes.next_prompts) == 0 and not fakes.next_prompts._tools and not fakes.next_prompts._by_run


def test_without_langchains_functions_nothing_is_predicted(monkeypatch: pytest.MonkeyPatch) -> None:
    from orla_lg.graph.tools.split import as_written

    monkeypatch.setattr(as_written, "_converters", lambda: None)
    assert as_written.answer_message(answer("t0")) is None
    assert as_written.result_message("text", "t0") is None
    fakes = Fakes()
    fakes.answered([HELLO], answer("t0"))
    assert len(fakes.next_prompts) == 0


def test_messages_are_as_langchain_writes_them() -> None:
    from orla_lg.graph.tools.split.as_written import answer_message, result_message

    raw = answer("t0", reasoning_content="hm", refusal=None)
    raw["tool_calls"][0]["function"]["arguments"] = '{"x":"ü",\n "y":[1,2]}'
    made = answer_message(raw)
    message = AIMessage("", tool_calls=[{"id": "t0", "name": "look", "args": {"x": "ü", "y": [1, 2]}}])
    assert made == _convert_message_to_dict(message)
    assert repr(made) == repr(_convert_message_to_dict(message)), "the hashes of messages go by that"
    assert answer_message(raw, "fox") == _convert_message_to_dict(message.model_copy(update={"name": "fox"}))
    assert answer_message({"role": "assistant", "tool_calls": 7}) is None
    assert result_message(result("other"), "t0") is None


# How many tools run beside each other


def last(fakes: Fakes) -> tuple[list[tuple[str, float]], int]:
    return list(fakes.kept[-1].running), fakes.kept[-1].at_once


def test_a_node_that_calls_its_tools_one_by_one_is_known_by_that() -> None:
    fakes = Fakes()
    fakes.answered([HELLO], answer("t0", "t1", "t2"))
    first = fakes.starts("t0")
    fakes.now = 2.0
    fakes.ends(first, result("t0"))
    assert last(fakes) == ([("look", 0.0), ("look", 0.0)], 1), "both are to come, and none began"
    second = fakes.starts("t1")
    fakes.now = 3.0
    fakes.ends(second, result("t1"))
    assert last(fakes) == ([("look", 0.0)], 1)


def test_a_node_that_runs_them_beside_each_other_is_known_by_that_in_later_answers_too() -> None:
    fakes = Fakes()
    fakes.answered([HELLO], answer("t0", "t1", "t2"))
    runs = [fakes.starts(f"t{nth}") for nth in range(3)]
    fakes.now = 2.0
    fakes.ends(runs[0], result("t0"))
    assert last(fakes) == ([("look", 2.0), ("look", 2.0)], 3)
    fakes.next_prompts.run_ended("run")
    fakes.answered([HELLO], answer("t0", "t1"))
    fakes.ends(fakes.starts("t0"), result("t0"))
    assert last(fakes) == ([("look", 0.0)], 3), "though the first ended before the second began"
    fakes.next_prompts.run_ended("run")
    fakes.answered([HELLO], answer("t0", "t1"), stage="another")
    fakes.ends(fakes.starts("t0"), result("t0"))
    assert last(fakes)[1] == 1, "of another node nothing is known"


def early_start(x: str, *, began_s: float = 0.0, ended_s: float = 0.0, error: Exception | None = None) -> EarlyStart:
    made = EarlyStart(AskingCall("c", "run", "model", "", 1), StructuredTool.from_function(
        lambda x: x, name="look", description="look"), ((), {}), {"x": x}, "tools")  # fmt: skip
    made.began_s, made.ended_s = began_s, ended_s
    if ended_s and error is None:
        made.outcome.set_result("found")
    elif ended_s:
        made.outcome.set_exception(error)
    return made


def test_a_tool_that_began_before_its_turn_runs_since_then() -> None:
    fakes, now = Fakes(), time.monotonic()
    starts = [
        early_start("t1", began_s=now - 5.0), early_start("t2", began_s=now - 5.0, ended_s=now - 1.0),
        early_start("t3", began_s=now - 5.0, ended_s=now - 1.0, error=ValueError("no")), early_start("t4"),
        early_start("t9"),
    ]  # fmt: skip
    fakes.answered([HELLO], answer("t0", "t1", "t2", "t3", "t4"), starts=starts)
    fakes.ends(fakes.starts("t0"), result("t0"))
    (running, *to_come), at_once = last(fakes)
    assert running == ("look", pytest.approx(5.0, abs=2.0)), "the second, whose turn is to come"
    assert to_come == [("look", 0.0)] * 2, "the third has its result, the fourth runs again, the fifth did not begin"
    assert at_once == 1


def test_where_all_results_are_there_nothing_is_waited_for() -> None:
    fakes, now = Fakes(), time.monotonic()
    fakes.answered([HELLO], answer("t0", "t1"), starts=[early_start("t1", began_s=now - 5.0, ended_s=now - 1.0)])
    fakes.ends(fakes.starts("t0"), result("t0"))
    assert [each.results for each in fakes.kept] == [0], "the answer alone, as it came"
