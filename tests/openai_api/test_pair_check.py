"""Whether an answer in one piece may be streamed from the engine: found out by one pair, beside the user's calls."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from langchain_core.messages import AIMessage, HumanMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla
from orla_lg.core.engine.backend import Probe
from orla_lg.graph import interception
from orla_lg.openai_api import agreement, pair_check
from orla_lg.openai_api.agreement import Agreement, differences, engine_of
from orla_lg.wires.chat import can_assemble
from tests.openai_api.raw_engine import MODEL, USAGE, Answer, Asked, RawEngine, events, whole
from tests.wires.test_watching import A, B, Watch, piece

CALLS = [
    {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": a}} for n, a in enumerate((A, B))
]
PLAIN = whole({"role": "assistant", "content": None, "tool_calls": CALLS})
PIECES = [piece(0, "f", ""), piece(0, None, A[:9]), piece(0, None, A[9:]), piece(1, "f", ""), piece(1, None, B)]
SAME = events([{"role": "assistant"}, *({"tool_calls": each} for each in PIECES)], usage=USAGE)
DROPS = events([{"role": "assistant"}, *({"tool_calls": each} for each in PIECES[:-1])], usage=USAGE)
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


def is_of_pair(asked: Asked) -> bool:
    return asked.body["messages"] == pair_check.QUESTION["messages"]


class TwoWays:
    """Answers in one piece and as a stream, and counts who asked how."""

    def __init__(self, streamed: Answer = SAME, plain: Answer = PLAIN) -> None:
        self.plain, self.streamed = plain, streamed
        self.pairs: list[bool] = []
        self.calls: list[bool] = []
        self.pair_may_end = threading.Event()
        self.pair_may_end.set()

    def __call__(self, asked: Asked) -> Answer:
        streams = bool(asked.body.get("stream"))
        (self.pairs if is_of_pair(asked) else self.calls).append(streams)
        if is_of_pair(asked):
            self.pair_may_end.wait(60)
        return self.streamed if streams else self.plain


class Asking:
    """A wrapped graph whose one node invokes its model, with a watch over the answer."""

    def __init__(self, engine: RawEngine, orla: Orla, monkeypatch: pytest.MonkeyPatch, **watch: bool) -> None:
        self.watches: list[Watch] = []

        def watch_for(*_: Any) -> Watch:
            self.watches.append(Watch(**watch))
            return self.watches[-1]

        monkeypatch.setattr(interception, "watch_for", watch_for)
        model = ChatOpenAI(base_url=engine.url, model=MODEL, api_key="k", max_retries=0).bind_tools([TOOL])

        def ask(state: MessagesState) -> Any:
            return {"messages": [model.invoke(state["messages"])]}

        graph = StateGraph(MessagesState).add_node("ask", ask).add_edge(START, "ask").compile()
        self._graph, self.orla = orla.wrap(graph, tools_safe={"f"}), orla

    def __call__(self) -> AIMessage:
        answer = self._graph.invoke({"messages": [HumanMessage("hello")]})["messages"][-1]
        assert [call["args"]["city"] for call in answer.tool_calls] == ["Paris", "Oslo"]
        return answer

    @property
    def agreement(self) -> Agreement:
        return self.orla.core.clients["main"].agreement

    def settle(self) -> None:
        """Wait for the pair."""
        until_s = time.monotonic() + 30
        while self.agreement.found is None and time.monotonic() < until_s:
            time.sleep(0.002)
        assert self.agreement.found is not None


@pytest.fixture
def asking(make_orla: Callable[..., Orla], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Asking]:
    def make(engine: RawEngine, /, watch: dict[str, bool] | None = None, **settings: Any) -> Asking:
        orla = make_orla(Backend("main", engine.url, model=MODEL, **settings), mapper={"*": "main"})
        return Asking(engine, orla, monkeypatch, **(watch or {}))

    return make


def test_equal_answers_are_streamed_once_that_is_known(asking: Any, caplog: pytest.LogCaptureFixture) -> None:
    ways = TwoWays()
    with RawEngine(ways) as engine, caplog.at_level(logging.INFO, "orla_lg"):
        ask = asking(engine)
        first = ask()
        ask.settle()
        later = [ask() for _ in range(3)]
        assert ways.pairs == [False, True] and ways.calls == [False, True, True, True]
        assert {(each.content, str(each.tool_calls), str(each.usage_metadata)) for each in [first, *later]} == {
            (first.content, str(first.tool_calls), str(first.usage_metadata))
        }
        assert not ask.watches[0].calls and [call[2:] for call in ask.watches[1].calls] == [("f", A), ("f", B)]
        assert ask.agreement.found == () and ask.agreement.had_calls
        said = [
            record.message for record in caplog.records if "are the same when they are streamed" in record.message
        ]
        assert len(said) == 1
        stages = [record.stage for record in ask.orla.records()]
        assert stages.count(pair_check.STAGE) == 2 and stages.count("ask") == 4


def test_an_engine_that_drops_arguments_in_streams_is_found_out(
    asking: Any, caplog: pytest.LogCaptureFixture
) -> None:
    ways = TwoWays(DROPS)
    with RawEngine(ways) as engine:
        ask = asking(engine)
        ask()
        ask.settle()
        ask()
        assert ways.calls == [False, False] and ways.pairs == [False, True]
        (said,) = [record.message for record in caplog.records if "differ when" in record.message]
        assert "choices[0].message.tool_calls[1].function.arguments" in said and "assemble=True" in said


@pytest.mark.parametrize(
    ("settings", "streams", "hears"),
    [({"assemble": True}, True, 2), ({"assemble": False}, False, 0), ({"early_tools": False}, False, 0),
     ({"early_tools": False, "assemble": True}, False, 0)],
)  # fmt: skip
def test_a_backend_that_decides_asks_for_no_pair(settings: Any, streams: bool, hears: int, asking: Any) -> None:
    ways = TwoWays(DROPS if not streams else SAME)
    with RawEngine(ways) as engine:
        ask = asking(engine, **settings)
        ask()
        assert ways.calls == [streams] and not ways.pairs
        (watch,) = ask.watches
        assert len(watch.calls) == hears and len(watch.end["tool_calls"]) == 2


def test_a_watch_that_wants_no_calls_streams_nothing_and_asks_for_no_pair(asking: Any) -> None:
    ways = TwoWays()
    with RawEngine(ways) as engine:
        ask = asking(engine, watch={"calls": False})
        ask()
        assert ways.calls == [False] and not ways.pairs and len(ask.watches[0].end["tool_calls"]) == 2


def test_no_call_waits_for_the_pair_which_is_asked_for_once(asking: Any) -> None:
    ways = TwoWays()
    with RawEngine(ways) as engine:
        ask = asking(engine)
        ways.pair_may_end.clear()
        for _ in range(3):
            ask()
        assert ways.calls == [False] * 3 and ways.pairs in ([], [False]) and ask.agreement.found is None
        ways.pair_may_end.set()
        ask.settle()
        assert ways.pairs == [False, True]


def test_a_pair_without_an_answer_harms_nothing_and_is_tried_again_later(
    asking: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = Answer(b'{"error": {"message": "busy"}}', status=503)

    def rule(asked: Asked) -> Answer:
        return broken if is_of_pair(asked) and is_broken else ways(asked)

    ways, is_broken = TwoWays(), True
    with RawEngine(rule) as engine:
        ask = asking(engine)
        ask()
        until_s = time.monotonic() + 30
        while ask.agreement._under_way and time.monotonic() < until_s:
            time.sleep(0.002)
        is_broken = False
        ask()
        time.sleep(0.02)
        assert not ways.pairs and ask.agreement.found is None
        ask.agreement._again_s = 0.0
        ask()
        ask.settle()
        assert ask.agreement.found == ()


def test_an_engine_that_refuses_the_pair_is_not_asked_again(asking: Any) -> None:
    refused = Answer(b'{"error": {"message": "no tools here"}}', status=400)
    ways = TwoWays()
    with RawEngine(lambda asked: refused if is_of_pair(asked) else ways(asked)) as engine:
        ask = asking(engine)
        ask()
        ask.settle()
        ask()
        assert "400" in str(ask.agreement) and ways.calls == [False, False]


SILENT = {"role": "assistant", "content": "I know of no weather.", "tool_calls": []}
"""With an empty list, as vLLM sends it."""


def silent(reason: str = "stop") -> dict[bool, Answer]:
    streamed = events([{"role": "assistant"}, {"content": SILENT["content"]}], finish=reason, usage=USAGE)
    return {False: whole(SILENT, finish=reason), True: streamed}


@pytest.mark.parametrize(
    ("engine", "reason", "more"),
    [("openai", "stop", None), ("openai", "length", {}), ("vllm", "length", {}),
     ("llamacpp", "stop", {"tool_choice": "required"})],
)  # fmt: skip
@pytest.mark.parametrize("then", ["calls", "silent", "refuses"])
def test_without_a_tool_call_in_it_a_pair_shows_nothing(
    engine: str, reason: str, more: dict[str, Any] | None, then: str, asking: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """It is asked for once more where that may show one; what was not seen is not streamed, and a warning says so."""
    ways, refused = TwoWays(), Answer(b'{"error": {"message": "no tool_choice here"}}', status=400)
    again: list[dict[str, Any]] = []

    def rule(asked: Asked) -> Answer:
        if not asked.body.get("tools") or asked.body.get("max_tokens") == 0:  # a probe
            return Answer(b"{}", status=404)
        if not is_of_pair(asked):
            return ways(asked)
        if asked.body["max_tokens"] == pair_check.MAX_TOKENS:
            return silent(reason)[bool(asked.body.get("stream"))]
        again.append(asked.body)
        return {"calls": ways, "silent": lambda asked: silent(reason)[bool(asked.body.get("stream"))],
                "refuses": lambda _: refused}[then](asked)  # fmt: skip

    with RawEngine(rule) as server:
        ask = asking(server, engine=engine)
        ask()
        ask.settle()
        ask()
        assert bool(again) is (more is not None)
        assert all(body.get("tool_choice") == (more or {}).get("tool_choice") for body in again)
        is_seen = more is not None and then == "calls"
        assert ways.calls == [False, is_seen] and ask.agreement.had_calls is is_seen
        warned = [record.message for record in caplog.records if "its model called no tool" in record.message]
        assert len(warned) == (not is_seen)
        assert all("Backend(assemble=True)" in each for each in warned)


def test_an_engine_that_takes_no_stream_goes_without(asking: Any) -> None:
    def rule(asked: Asked) -> Answer:
        if asked.body.get("stream"):
            return Answer(b'{"error": {"message": "stream is not supported"}}', status=400)
        return ways(asked)

    ways = TwoWays()
    with RawEngine(rule) as engine:
        ask = asking(engine)
        ask()
        ask.settle()
        ask()
        assert ways.calls == [False, False]


def test_closing_ends_a_pair_under_way(asking: Any) -> None:
    ways = TwoWays()
    with RawEngine(ways) as engine:
        ask = asking(engine)
        ways.pair_may_end.clear()
        ask()
        began_s = time.monotonic()
        ask.orla.close()
        assert time.monotonic() - began_s < 30, "of the 60 s for which the pair may be held"
        ways.pair_may_end.set()


# What is equal

HEAD = {"id": "a", "created": 1, "model": "m"}


def answer(message: dict[str, Any], **more: Any) -> dict[str, Any]:
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", **message}}
    return {**HEAD, "choices": [choice], **more}


def called(arguments: str, id: str = "x") -> dict[str, Any]:
    return {"tool_calls": [{"id": id, "type": "function", "function": {"name": "f", "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("plain", "streamed"),
    [
        (answer({"content": "x"}), answer({"content": "x"}) | {"id": "b", "created": 2}),
        (answer({"content": "x", "reasoning": None}, kv_transfer_params=None), answer({"content": "x"})),
        (answer(called('{"a": 1}')), answer(called('{\n "a":1}', "y"))),
        (answer({"content": "x"}, usage={"prompt_tokens": 1, "prompt_tokens_details": {"cached_tokens": 7}}),
         answer({"content": "x"}, usage={"prompt_tokens": 1, "prompt_tokens_details": None})),
        (answer({"content": None}), answer({"content": ""})),
        (answer({"content": "x", "tool_calls": []}), answer({"content": "x"})),
        (answer({}, usage={"prompt_tokens_details": {"cached_tokens": 0, "created_cache_tokens": 32}}),
         answer({}, usage={"prompt_tokens_details": {"cached_tokens": 32, "created_cache_tokens": 0}})),
        (answer({"content": "x"}, timings={"prompt_ms": 3}), answer({"content": "x"}, usage=None)),
    ],
)  # fmt: skip
def test_answers_that_are_equal(plain: Any, streamed: Any) -> None:
    assert not list(differences(plain, streamed)) and not list(differences(streamed, plain))


@pytest.mark.parametrize(
    ("plain", "streamed", "where"),
    [
        (answer({"content": "x"}), answer({"content": "y"}), "choices[0].message.content"),
        (answer({"content": "x"}), answer({}), "choices[0].message.content"),
        (answer({"content": "x", "reasoning": "r"}), answer({"content": "x"}), "choices[0].message.reasoning"),
        (answer(called('{"a": 1}')), answer(called("")), "choices[0].message.tool_calls[0].function.arguments"),
        (answer(called('{"a": 1}')), answer(called('{"a": "1"}')), "choices[0].message.tool_calls[0].function.arg"),
        (answer(called("{}")), answer({"content": "{}"}), "choices[0].message.tool_calls"),
        (answer({}, usage={"prompt_tokens": 1}), answer({}, usage={"prompt_tokens": 2}), "usage.prompt_tokens"),
        (answer({}, usage={"prompt_tokens": 1}), answer({}), "usage"),
        (answer({}, service_tier="default"), answer({}), "service_tier"),
    ],
)  # fmt: skip
def test_answers_that_differ(plain: Any, streamed: Any, where: str) -> None:
    for one, other in ((plain, streamed), (streamed, plain)):
        found = list(differences(one, other))
        assert any(where in each for each in found)


def test_another_engine_is_asked_again_and_an_old_pair_says_nothing_of_it() -> None:
    known = Agreement(Backend("main", "http://127.0.0.1:1/v1"))
    old, new = engine_of(Probe(incarnation="1")), engine_of(Probe(incarnation="2"))
    assert known.begins(old) and not known.begins(old)
    known.learn(old, answer(called("{}")), answer(called("{}")))
    assert known.holds(old) is True and known.holds(new) is None and not known.begins(old)
    assert known.begins(new) and known.holds(old) is None
    known.learn(old, {"a": 1}, {"a": 2})
    assert known.holds(new) is None
    known.conclude(new, ["a is odd"])
    assert known.holds(new) is False and "a is odd" in str(known)


def test_an_engine_is_no_other_one_once_it_was_probed() -> None:
    known, probed = Agreement(Backend("main", "http://127.0.0.1:1/v1")), engine_of(Probe(incarnation="1"))
    assert known.begins(engine_of(None)) and not known.begins(probed)
    known.learn(engine_of(None), answer(called("{}")), answer(called("{}")))
    assert known.holds(probed) is True and not known.begins(probed) and known.holds(engine_of(None)) is True
    other = engine_of(Probe(incarnation="2"))
    assert known.holds(other) is None and known.begins(other)


def test_a_pair_is_tried_a_few_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(agreement, "AGAIN_S", 0.0)
    known, engine = Agreement(Backend("main", "http://127.0.0.1:1/v1")), engine_of(None)
    for _ in range(agreement.MOST_TRIES):
        assert known.begins(engine)
        known.fails(engine, TimeoutError())
    assert not known.begins(engine) and known.holds(engine) is None and "not known" in str(known)


def test_the_question_is_one_that_may_be_streamed() -> None:
    assert can_assemble(json.loads(json.dumps({**pair_check.QUESTION, "model": "m", "tool_choice": "required"})))
