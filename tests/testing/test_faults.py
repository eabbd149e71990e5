"""The fault engine fails as it says, when it says, and works in between."""

from __future__ import annotations

import ast
import json
import sys
import threading
import time
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from orla_lg.testing import faults
from orla_lg.testing.faults import MODEL, Fault, FaultEngine, Gate, Reply
from orla_lg.testing.faults.reply import STATUS
from tests.timed import within

HELLO = {"model": MODEL, "messages": [{"role": "user", "content": "one two three four five six seven"}]}
STREAM = {"stream": True, "stream_options": {"include_usage": True}}


def ask(engine: FaultEngine, **more: Any) -> httpx.Response:
    with httpx.Client(trust_env=False, timeout=10) as http:
        return http.post(f"{engine.url}/chat/completions", json={**HELLO, **more})


def events(response: httpx.Response) -> list[str]:
    return [line.removeprefix("data: ") for line in response.text.splitlines() if line]


def outcome(engine: FaultEngine, **more: Any) -> str:
    """Return in one word or two how a request ended."""
    try:
        response = ask(engine, **more)
    except httpx.HTTPError as error:
        return type(error).__name__
    if response.is_error:
        return str(response.status_code)
    if more.get("stream"):
        return "whole" if events(response)[-1] == "[DONE]" else "cut short"
    try:
        return "whole" if response.json()["choices"] else "empty"
    except ValueError:
        return "no JSON"


# Health ---------------------------------------------------------------------------------------------------


def test_in_health_it_answers_streams_counts_and_caches() -> None:
    with FaultEngine() as engine:
        answer = ask(engine).json()
        pieces = [json.loads(event) for event in events(ask(engine, **STREAM))[:-1]]
        listed = httpx.get(f"{engine.url}/models", trust_env=False).json()["data"][0]
    assert answer["choices"][0]["message"]["content"] == "1 user said: one two three four five six seven"
    assert answer["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    said = "".join(piece["choices"][0]["delta"].get("content") or "" for piece in pieces if piece["choices"])
    assert said == answer["choices"][0]["message"]["content"]
    assert pieces[-1]["usage"]["prompt_tokens"] == 8 and pieces[-1]["usage"]["completion_tokens"] == 10
    assert pieces[-1]["usage"]["prompt_tokens_details"]["cached_tokens"] == 7
    assert (listed["id"], listed["max_model_len"]) == (MODEL, 4096)


def test_it_keeps_to_max_tokens_and_says_so() -> None:
    with FaultEngine() as engine:
        choice = ask(engine, max_tokens=3).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("1 user said:", "length")


@pytest.mark.parametrize(
    ("wrong", "status"),
    [
        ({"model": "other"}, 404),
        ({"messages": []}, 400),
        ({"messages": [{"role": "user", "content": "a " * 99}]}, 400),
    ],
)
def test_it_refuses_what_engines_refuse(wrong: dict[str, Any], status: int) -> None:
    with FaultEngine(context_tokens=50) as engine:
        assert ask(engine, **wrong).status_code == status


# Faults ---------------------------------------------------------------------------------------------------

ENDS = {
    Fault.SLOW_FIRST_TOKEN: ("whole", "whole"),
    Fault.SLOW_TOKENS: ("whole", "whole"),
    Fault.HANG: ("ReadTimeout", "ReadTimeout"),
    Fault.DEAD_BEFORE_HEADERS: ("RemoteProtocolError", "RemoteProtocolError"),
    Fault.RESET: ("ReadError", "ReadError"),
    Fault.DEAD_IN_PREFILL: ("ReadError", "ReadError"),
    Fault.DEAD_MID_STREAM: ("ReadError", "ReadError"),
    Fault.RESTART: ("ReadError", "ReadError"),
    Fault.NO_DONE: ("cut short", "whole"),
    Fault.ERROR_EVENT: ("cut short", "whole"),
    Fault.GARBAGE: ("cut short", "no JSON"),
    Fault.HTML_PAGE: ("cut short", "no JSON"),
    Fault.BINARY: ("cut short", "no JSON"),
    Fault.TRUNCATED_JSON: ("cut short", "no JSON"),
    Fault.WRONG_TYPE: ("whole", "whole"),
    Fault.NO_USAGE: ("whole", "whole"),
    Fault.CACHED_ABOVE_PROMPT: ("whole", "whole"),
    Fault.NEGATIVE_TOKENS: ("whole", "whole"),
    **{fault: (str(status), str(status)) for fault, status in STATUS.items()},
}


@pytest.mark.parametrize("fault", Fault, ids=lambda fault: fault.name)
def test_each_fault_ends_as_it_says_and_the_next_request_is_well(
    fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    client, patience_s = httpx.Client, 0.5 if fault is Fault.HANG else 30.0
    monkeypatch.setattr(httpx, "Client", lambda **how: client(**{**how, "timeout": patience_s}))
    with FaultEngine(script=[fault, None, fault], slow_s=0.02) as engine:
        assert (outcome(engine, **STREAM), outcome(engine), outcome(engine)) == (
            ENDS[fault][0],
            "whole",
            ENDS[fault][1],
        )
        engine.wait(lambda engine: engine.in_flight == 0)
        assert not engine.script


def test_slow_is_slow_where_it_says() -> None:
    def first_and_last(engine: FaultEngine) -> tuple[float, float]:
        began = time.perf_counter()
        with httpx.Client(trust_env=False) as http:
            with http.stream("POST", f"{engine.url}/chat/completions", json={**HELLO, **STREAM}) as response:
                times = [time.perf_counter() - began for _ in response.iter_lines()]
        return times[0], times[-1] - times[0]

    with FaultEngine(slow_s=0.1) as engine:

        def rest_s() -> float:
            engine.script.append(Fault.SLOW_FIRST_TOKEN)
            first, rest = first_and_last(engine)
            assert first > 0.1
            return rest

        within(0.1, rest_s)
        engine.script.append(Fault.SLOW_TOKENS)
        _, rest = first_and_last(engine)
        assert rest > 0.8, "ten pieces, each a tenth of a second late"


def test_lies_about_tokens() -> None:
    with FaultEngine(script=[Fault.NO_USAGE, Fault.CACHED_ABOVE_PROMPT, Fault.NEGATIVE_TOKENS]) as engine:
        assert "usage" not in ask(engine).json()
        above = ask(engine).json()["usage"]
        negative = ask(engine).json()["usage"]
    assert above["prompt_tokens_details"]["cached_tokens"] > above["prompt_tokens"] > 0
    assert negative["prompt_tokens"] < 0 and negative["completion_tokens"] < 0


def test_a_stream_without_its_end_has_its_text_but_no_reason_and_no_usage() -> None:
    with FaultEngine(script=[Fault.NO_DONE]) as engine:
        pieces = [json.loads(event) for event in events(ask(engine, **STREAM))]
    assert pieces[-1]["choices"][0]["delta"]["content"] == " seven"
    assert all("usage" not in piece and piece["choices"][0]["finish_reason"] is None for piece in pieces)


def test_busy_says_when_to_come_back() -> None:
    with FaultEngine(script=[Fault.BUSY, Fault.BUSY_UNTIL, Fault.OVERLOADED], retry_after_s=7) as engine:
        assert ask(engine).headers["retry-after"] == "7"
        date = parsedate_to_datetime(ask(engine).headers["retry-after"])
        assert abs(date.timestamp() - time.time() - 7) < 3
        assert "retry-after" not in ask(engine).headers


def test_a_restart_forgets_and_drops_everybody() -> None:
    gate = Gate()
    with FaultEngine(script=[None, Reply(gate=gate), Fault.RESTART]) as engine:
        assert ask(engine).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        others: list[str] = []
        other = threading.Thread(target=lambda: others.append(outcome(engine)))
        other.start()
        engine.wait(lambda engine: engine.in_flight == 1)
        assert outcome(engine) == "ReadError"
        other.join(5)
        assert others == ["ReadError"], "whoever was there is dropped too"
        assert ask(engine).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        assert ask(engine).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 7
        engine.restart()
        assert ask(engine).json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


# When -----------------------------------------------------------------------------------------------------


def test_a_script_is_done_in_order() -> None:
    with FaultEngine(script=[Fault.BROKEN, Fault.BROKEN]) as engine:
        assert [outcome(engine) for _ in range(3)] == ["500", "500", "whole"]


def test_chance_is_the_same_under_the_same_seed() -> None:
    def ends(seed: int) -> list[str]:
        with FaultEngine(chances={Fault.BROKEN: 0.3, Fault.RESET: 0.2}, seed=seed) as engine:
            return [outcome(engine) for _ in range(60)]

    first = ends(1)
    assert first == ends(1) != ends(2)
    assert 8 < first.count("500") < 30 and 4 < first.count("ReadError") < 24 and "whole" in first


def test_faults_spare_probes_unless_told_otherwise() -> None:
    for everywhere, status in ((False, 200), (True, 503)):
        with FaultEngine(chances={Fault.OVERLOADED: 1.0}, every_path=everywhere) as engine:
            assert httpx.get(f"{engine.url}/models", trust_env=False).status_code == status
            assert ask(engine).status_code == 503


def test_a_fault_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="explode"):
        Reply(fault="explode")


def test_it_needs_nothing_but_the_standard_library() -> None:
    folder = Path(faults.__file__).parent
    found = {
        name.split(".")[0]
        for file in folder.glob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [alias.name for alias in node.names] if isinstance(node, ast.Import)
            else [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
        )
    }  # fmt: skip
    assert found - set(sys.stdlib_module_names) == {"orla_lg"}
