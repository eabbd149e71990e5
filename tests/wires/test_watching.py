"""What a watch hears of an answer: its calls, each once and whole, and one end, however the bytes come."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orla_lg.core.inflight import InFlightCall
from orla_lg.wires import hearing, whole_calls
from orla_lg.wires.assembly import Assembly
from orla_lg.wires.chat import CHAT
from orla_lg.wires.reading import payload
from orla_lg.wires.tap import Mode, Tap, TappedResponse
from orla_lg.wires.tool_calls import ToolCalls
from orla_lg.wires.watching import HeardToolCall, Late
from orla_lg.wires.whole_calls import MOST_HEARD, BraceScan, HeardCalls
from orla_lg.wires.wire import Wire
from tests.differential.render import body_of
from tests.differential.script import Answer, Reply
from tests.differential.strategies import calling, dialects, numberings
from tests.openai_api.test_assembly import DIALECTS

A, B = '{"city": "Paris"}', '{"city": "Oslo"}'
ARGUMENTS = ("", A, A[:5], A[5:], B, B[:3], B[3:], "{}", "null", None, {"a": 1})
VALUES = st.text(max_size=8) | st.lists(st.text(max_size=3), max_size=2)


class Flight:
    """As much of a call as a tap needs."""

    cut: str | None = None

    def first_token(self) -> None: ...
    def saw(self, usage: Any) -> None: ...
    def finish(self, error: Any = None) -> None: ...
    def broke(self, error: Any) -> None: ...


class Response:
    """As much of a response as a tap needs."""

    status_code = 200

    def __init__(self) -> None:
        self.headers = {"content-type": "application/json"}


class Watch:
    """Writes down what it hears."""

    def __init__(self, *, calls: bool = True, message: bool = True) -> None:
        self.wants_calls, self.wants_message = calls, message
        self.heard: list[Any] = []
        self.late: list[Late] = []

    def comes_late(self, why: Late) -> None:
        self.late.append(why)

    def begins(self) -> None:
        self.heard.append("begins")

    def tool_call(self, call: HeardToolCall) -> None:
        self.heard.append(call)

    def ends(self, message: Mapping[str, Any] | None) -> None:
        self.heard.append(("ends", message))

    @property
    def calls(self) -> list[HeardToolCall]:
        return [each for each in self.heard if isinstance(each, HeardToolCall)]

    @property
    def end(self) -> Any:
        assert self.heard[0] == "begins" and self.heard.count("begins") == 1
        (end,) = [each for each in self.heard if isinstance(each, tuple) and each[0] == "ends"]
        assert self.heard[-1] is end
        return end[1]


def passed(
    watch: Any, data: bytes, mode: Mode, *, cuts: Sequence[int] = (), wire: Wire = CHAT, early: bool = True
) -> bytes | Exception:
    """Let an answer pass, cut as *cuts* want; returns what its caller gets."""
    tap = Tap(cast("InFlightCall", Flight()), mode, wire=wire, watch=watch, early=early)
    at, got, number = 0, b"", 0
    try:
        while at < len(data):
            size = cuts[number % len(cuts)] if cuts else len(data)
            got += tap.feed(data[at : at + size])
            at, number = at + size, number + 1
        got += tap.last(cast("TappedResponse", Response()))
    except Exception as error:  # the caller's
        tap.broke(error)
        return error
    finally:
        tap.closed()
    return got


def streamed(*deltas: Any, finish: str | None = "tool_calls") -> bytes:
    """Return a stream of these deltas of tool calls."""
    chunks: list[Any] = [{"choices": [{"index": 0, "delta": {"tool_calls": delta}}]} for delta in deltas]
    if finish:
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def calls_in(message: Mapping[str, Any]) -> list[tuple[int, Any, str, str]]:
    """Return the calls of a whole answer that can be heard."""
    found = []
    for position, call in enumerate(message.get("tool_calls", ())):
        function = call["function"]
        arguments = function["arguments"]
        if function["name"] and (not arguments.strip() or _is_object(arguments)):
            found.append((position, call.get("id"), function["name"], (arguments.strip() and arguments) or "{}"))
    return found


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False


def message_of(data: bytes) -> dict[str, Any]:
    assembly = Assembly()
    for event in data.split(b"\n\n"):
        if (chunk := payload(event)) is not None:
            assembly.add(chunk)
    return cast("dict[str, Any]", assembly.completion()["choices"][0]["message"])


def are_heard(watch: Watch, message: Mapping[str, Any]) -> None:
    """Assert that each call was heard once, as the whole message has it; an id may come after the call is whole."""
    heard = sorted(watch.calls)
    meant = calls_in(message)
    assert [(each.position, each.name, each.arguments) for each in heard] == [
        (at, name, arguments) for at, _, name, arguments in meant
    ]
    assert all(each.id in (id, None, "") for each, (_, id, *_) in zip(heard, meant, strict=True))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("mode", ["stream", "assemble"])
@pytest.mark.parametrize("wants_message", [True, False])
def test_each_call_of_a_dialect_is_heard_once(dialect: str, mode: Mode, wants_message: bool) -> None:
    watch = Watch(message=wants_message)
    data = streamed(*DIALECTS[dialect][0])
    passed(watch, data, mode)
    are_heard(watch, message_of(data))
    assert watch.end == (message_of(data) if wants_message else None)


@settings(max_examples=150, deadline=None)
@given(answer=calling, numbering=numberings, dialect=dialects, mode=st.sampled_from(("stream", "assemble")),
       cuts=st.lists(st.integers(1, 80), max_size=4), wants_message=st.booleans())  # fmt: skip
def test_what_is_heard_is_what_the_answer_has(
    answer: Answer, numbering: Any, dialect: Any, mode: Mode, cuts: list[int], wants_message: bool
) -> None:
    reply = Reply(answer=answer, numbering=numbering, dialect=dialect)
    data, _, _ = body_of(reply, {"stream": True})
    alone, watch = passed(None, data, mode, cuts=cuts), Watch(message=wants_message)
    got = passed(watch, data, mode, cuts=cuts)
    if isinstance(got, Exception):
        assert type(got) is type(alone)
        assert not watch.heard or watch.end is None
        return
    assert got == alone
    end = watch.end
    if mode == "assemble" and "choices" in (whole := json.loads(got)):
        message = whole["choices"][0]["message"]
        assert end == (message if wants_message else None)
        if answer.finish in ("stop", "tool_calls"):
            are_heard(watch, message)
        else:  # a call without arguments may be one cut short
            assert {tuple(each) for each in watch.calls} <= set(calls_in(message))


@given(
    st.lists(
        st.fixed_dictionaries(
            {},
            optional={
                "index": st.sampled_from((0, 0, 1, 2, None, "0")), "id": st.sampled_from(("a", "b", "", None, 7)),
                "function": st.fixed_dictionaries({}, optional={
                    "name": st.sampled_from(("f", "g", "", None)),
                    "arguments": st.sampled_from(ARGUMENTS),
                }),
            },
        ),
        max_size=8,
    )
)  # fmt: skip
@settings(max_examples=300, deadline=None)
def test_no_call_is_heard_twice_or_before_it_is_whole(deltas: list[Any]) -> None:
    told = list[HeardToolCall]()
    heard = HeardCalls(told.append)
    calls = ToolCalls(heard)
    for delta in deltas:
        before = len(told)
        calls.add(delta)
        now = calls.whole()
        for call in told[before:]:
            assert (json.loads(call.arguments) and call.name) or call.arguments == "{}"
            assert any((one["function"]["name"], one["function"]["arguments"]) == call[2:] for one in now)
    heard.finish("stop")
    assert len({(call.position) for call in told}) == len(told)


@given(
    st.dictionaries(st.text(max_size=5), VALUES, max_size=4), st.lists(st.integers(1, 5), min_size=1), st.booleans()
)  # fmt: skip
def test_braces_balance_exactly_at_the_end(value: dict[str, Any], cuts: list[int], ascii: bool) -> None:
    text, scan, at, number = json.dumps(value, ensure_ascii=ascii), BraceScan(), 0, 0
    while at < len(text):
        piece = text[at : at + cuts[number % len(cuts)]]
        at, number = at + len(piece), number + 1
        assert scan.feed(piece) is (at >= len(text))
    assert not scan.feed("}")


def heard_at(*deltas: Any, finish: str | None = "tool_calls") -> list[int]:
    """Return how many calls are heard after each event of a stream."""
    watch, numbers = Watch(), []
    tap = Tap(cast("InFlightCall", Flight()), "stream", watch=watch)
    for event in streamed(*deltas, finish=finish).split(b"\n\n")[:-1]:
        tap.feed(event + b"\n\n")
        numbers.append(len(watch.calls))
    tap.last(cast("TappedResponse", Response()))
    return [*numbers, len(watch.calls)]


def piece(index: int, name: str | None = None, arguments: str | None = None) -> list[Any]:
    named = {} if name is None else {"id": f"call_{index}", "type": "function"}
    function = {key: value for key, value in (("name", name), ("arguments", arguments)) if value is not None}
    return [{"index": index, **named, "function": function}]


def test_a_call_is_heard_as_soon_as_its_braces_balance() -> None:
    first = [piece(0, "f", ""), piece(0, None, '{"a": "}'), piece(0, None, '{\\"", "b": {}}')]
    assert heard_at(*first, piece(1, "g", A), finish=None) == [0, 0, 1, 2, 2, 2]


def test_an_empty_object_is_heard_when_the_next_call_begins() -> None:
    assert heard_at(piece(0, "f", "{}"), piece(1, "g", "{}")) == [0, 1, 2, 2, 2]


def test_no_arguments_at_all_are_heard_at_the_end_unless_it_cuts_the_answer() -> None:
    assert heard_at(piece(0, "f", ""), piece(1, "g", A)) == [0, 1, 2, 2, 2]
    assert heard_at(piece(0, "f", ""), finish="length") == [0, 0, 0, 0]
    assert heard_at(piece(0, "f", ""), finish=None) == [0, 0, 0]


def test_a_provisional_object_is_not_taken_for_the_call() -> None:
    watch = Watch()
    passed(watch, streamed(piece(0, "f", "{}"), piece(0, None, A)), "stream")
    assert [call[2:] for call in watch.calls] == [("f", A)]
    assert watch.end["tool_calls"][0]["function"]["arguments"] == A


def test_calls_beyond_a_number_are_not_heard_and_cost_little() -> None:
    watch = Watch()
    passed(watch, streamed(*(piece(number, "f", f'{{"n": {number}}}') for number in range(2000))), "stream")
    assert [call.position for call in watch.calls] == list(range(MOST_HEARD))
    assert len(watch.end["tool_calls"]) == 2000


def test_calls_that_are_not_heard_have_their_place() -> None:
    custom = [{"index": 0, "id": "c", "type": "custom", "custom": {"name": "sql", "input": "x"}}]
    watch = Watch()
    passed(watch, streamed(custom, piece(1, "f", A)), "stream")
    assert [call.position for call in watch.calls] == [1] and watch.end["tool_calls"][1]["id"] == "call_1"


def looks_at(monkeypatch: pytest.MonkeyPatch, data: bytes) -> int:
    """Return how often arguments are parsed while a stream is heard."""
    looks = list[int]()

    def object_of(arguments: str) -> Any:
        looks.append(len(arguments))
        return whole_calls_object(arguments)

    whole_calls_object = whole_calls.object_of
    with monkeypatch.context() as patch:
        patch.setattr(whole_calls, "object_of", object_of)
        passed(Watch(), data, "stream")
    return len(looks)


def test_nothing_is_looked_at_over_and_over(monkeypatch: pytest.MonkeyPatch) -> None:
    last = {"index": 0, "delta": {"tool_calls": piece(0, None, "x")}, "finish_reason": "stop"}
    finishes = b"data: " + json.dumps({"choices": [last]}).encode() + b"\n\n"
    open_call = streamed(piece(0, "f", '{"a": "'), finish=None).removesuffix(b"data: [DONE]\n\n")
    assert looks_at(monkeypatch, open_call + finishes * 2000 + b"data: [DONE]\n\n") < 10
    in_turn = [each for number in range(500) for each in (piece(number, "f", "{"), piece(0, None, "x"))]
    assert looks_at(monkeypatch, streamed(*in_turn)) < MOST_HEARD + 10
    custom = [[{"index": n, "id": f"c{n}", "custom": {"input": "x"}}] for n in range(3000)]
    assert looks_at(monkeypatch, streamed(*custom, piece(5000, "f", A))) == 0


@pytest.mark.parametrize("wants_message", [True, False])
def test_what_follows_the_end_of_a_stream_is_not_heard(wants_message: bool) -> None:
    watch, late = Watch(message=wants_message), streamed(piece(1, "g", B))
    passed(watch, streamed(piece(0, "f", A)) + late, "stream")
    assert [call.name for call in watch.calls] == ["f"]
    assert not wants_message or len(watch.end["tool_calls"]) == 1


@pytest.mark.parametrize("mode", ["plain", "assemble"])
def test_an_answer_in_one_piece_brings_its_message(mode: Mode) -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": []}
    data = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
    watch = Watch()
    assert passed(watch, data, mode, cuts=(7,)) == data
    assert watch.end == message and not watch.calls
    unread = Watch(message=False)
    passed(unread, data, mode)
    assert unread.end is None


@pytest.mark.parametrize("body", [b"{}", b'{"choices": 3}', b'{"choices": [7]}', b'{"choices": [{"message": "x"}]}'])
def test_an_answer_without_a_message_ends_without_one(body: bytes) -> None:
    watch = Watch()
    assert passed(watch, body, "plain") == body
    assert watch.end is None


def test_what_is_too_long_ends_without_its_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hearing, "MAX_WHOLE_BYTES", 10)
    monkeypatch.setattr(hearing, "MAX_STREAM_BYTES", 200)
    for mode, data in (
        ("plain", b'{"choices": [{"message": {"content": "x"}}]}'),
        ("stream", streamed(piece(0, "f", A))),
    ):
        watch = Watch()
        assert passed(watch, data, cast("Mode", mode)) == data
        assert watch.end is None


@pytest.mark.parametrize("cut", range(0, 400, 23))
@pytest.mark.parametrize("mode", ["stream", "assemble", "plain"])
def test_an_answer_that_breaks_off_ends_once_and_without_a_message(mode: Mode, cut: int) -> None:
    data, watch = streamed(piece(0, "f", A), piece(1, "g", B))[: cut + 1], Watch()
    assert isinstance(passed(watch, data, mode, cuts=(11,)), Exception)
    assert watch.end is None


def test_an_answer_that_is_left_unread_ends_without_a_message() -> None:
    watch = Watch()
    tap = Tap(cast("InFlightCall", Flight()), "stream", watch=watch)
    tap.feed(streamed(piece(0, "f", A))[:200])
    tap.closed()
    tap.closed()
    assert watch.end is None


def test_a_stream_closed_after_its_end_was_read() -> None:
    watch = Watch()
    tap = Tap(cast("InFlightCall", Flight()), "stream", watch=watch)
    tap.feed(streamed(piece(0, "f", A)))
    tap.closed()
    assert watch.end["tool_calls"][0]["function"] == {"name": "f", "arguments": A}


def test_a_backend_without_early_tools_brings_the_end_alone() -> None:
    for mode in ("stream", "assemble"):
        watch = Watch()
        passed(watch, streamed(piece(0, "f", A)), cast("Mode", mode), early=False)
        assert not watch.calls and watch.end["tool_calls"]


ALL = ["begins", "tool_call", "tool_call", "ends"]


class Failing(Watch):
    """Fails at one of the things it hears."""

    def __init__(self, at: str) -> None:
        super().__init__()
        self.at = at

    def _heed(self, what: str) -> None:
        self.heard.append(what)
        if what == self.at:
            raise RuntimeError("a fault of the watch")

    def comes_late(self, why: Late) -> None:
        self._heed("comes_late")

    def begins(self) -> None:
        self._heed("begins")

    def tool_call(self, call: HeardToolCall) -> None:
        self._heed("tool_call")

    def ends(self, message: Mapping[str, Any] | None) -> None:
        self._heed("ends")


@pytest.mark.parametrize("at", ["begins", "tool_call", "ends"])
@pytest.mark.parametrize("mode", ["stream", "assemble"])
def test_a_watch_that_raises_harms_nothing_and_is_dropped(
    at: str, mode: Mode, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hearing, "_faults", set())
    data = streamed(piece(0, "f", A), piece(1, "g", B))
    with caplog.at_level(logging.ERROR, "orla_lg"):
        for _ in range(2):
            watch = Failing(at)
            assert passed(watch, data, mode, cuts=(9,)) == passed(None, data, mode, cuts=(9,))
            assert (
                watch.heard
                == ["begins", "tool_call", "tool_call", "ends"][: ["begins", "tool_call", "", "ends"].index(at) + 1]
            )
    assert len(caplog.records) == 1 and "logged once" in caplog.text


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200) | st.just(streamed(piece(0, "f", A))), st.lists(st.integers(1, 50), max_size=3),
       st.sampled_from(("stream", "assemble", "plain")))  # fmt: skip
def test_no_byte_is_changed(data: bytes, cuts: list[int], mode: Mode) -> None:
    watch = Watch()
    alone, got = passed(None, data, mode, cuts=cuts), passed(watch, data, mode, cuts=cuts)
    assert type(got) is type(alone) and (isinstance(got, Exception) or got == alone)
    assert not watch.heard or (watch.end is None) is isinstance(got, Exception) or mode == "plain"
