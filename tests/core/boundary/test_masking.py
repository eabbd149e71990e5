"""No key of ours or of a caller's is left in what is recorded, written down or logged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import ChatOrla, Orla
from orla_lg.core.boundary.masking import KEEP_CALLERS, Masking
from orla_lg.testing.faults import exchange
from tests.conftest import BACKEND_KEY, CALLER_KEY, at, chat
from tests.stub_engine import Reply, StubEngine


class Revealed:
    """A key that does not show itself."""

    def reveal(self) -> str:
        return "revealed-only-so"


def test_keys_are_masked_and_words_are_not() -> None:
    masking = Masking(["first-key-of-ours", None, "ollama", "none", Revealed(), "first-key-of-ours-longer"])
    masking.learn("the-callers-key")
    masking.learn("x")
    said = masking.mask("first-key-of-ours first-key-of-ours-longer the-callers-key revealed-only-so ollama none x")
    assert said == "*** *** *** *** ollama none x"
    assert masking.mask("Authorization: Bearer abcdefgh12345678.x") == "Authorization: Bearer ***"
    assert masking.mask("Incorrect API key provided: sk-proj-abcdefghij.") == "Incorrect API key provided: sk-***."
    assert masking.mask("a sk-8, of bearers") == "a sk-8, of bearers"
    assert Masking().mask("nothing") == "nothing"


def test_callers_keys_are_known_for_a_bounded_while() -> None:
    masking = Masking()
    for number in range(KEEP_CALLERS + 1):
        masking.learn(f"key-number-{number:05}")
    assert masking.mask("key-number-00000 key-number-00001") == "key-number-00000 ***"


def test_log_lines_and_their_tracebacks_are_masked() -> None:
    masking, lines = Masking(["key-of-the-backend"]), []
    logger = logging.Logger("own")
    logger.addFilter(masking)
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(logging.Formatter().format(record))  # type: ignore[method-assign]
    logger.addHandler(handler)
    logger.warning("refused: %s", "bad key-of-the-backend")
    try:
        raise ValueError("bad key-of-the-backend")
    except ValueError:
        logger.exception("failed")
    assert lines[0] == "refused: bad ***" and "ValueError: bad ***" in lines[1]


@pytest.mark.parametrize("status", [401, 404, 500])
def test_a_key_that_an_engine_echoes_is_in_no_record_file_or_log(
    engine: StubEngine,
    make_orla: Callable[..., Orla],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    status: int,
) -> None:
    caplog.set_level(logging.DEBUG, "orla_lg")
    echo = f"{'x' * 360} wrong key {BACKEND_KEY} for {CALLER_KEY}"
    refuse = exchange.Exchange._refuse
    monkeypatch.setattr(
        exchange.Exchange, "_refuse", lambda self, code, said, headers=(): refuse(self, code, echo, headers)
    )
    engine.rule = lambda seen: Reply(status=status)
    orla = make_orla(at(engine), mapper={"*": "main"}, records_file=tmp_path / "r")
    llm = chat(engine)

    def node(state: MessagesState) -> dict[str, Any]:
        return {"messages": [llm.invoke(state["messages"])]}

    app = orla.wrap(StateGraph(MessagesState).add_node("a", node).add_edge(START, "a"))
    with pytest.raises(openai.OpenAIError):
        app.invoke({"messages": [("user", "hi")]})
    with pytest.raises(openai.OpenAIError):
        ChatOrla(orla=orla, model="main", max_retries=1).invoke("hi")
    orla.close()
    records = orla.records()
    assert len(records) == 2 and all(record.error and "wrong key" in record.error for record in records)
    said = repr(records) + (tmp_path / "r").read_text() + caplog.text
    for key in (BACKEND_KEY, CALLER_KEY, BACKEND_KEY[:12], CALLER_KEY[:12]):
        assert key not in said, key
