"""Sessions from a user's file."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from orla_lg.errors import ConfigError
from orla_lg_sim.sessions import Shape, read

CALL = {"id": "1", "type": "function", "function": {"name": "look_up", "arguments": '{"id": 7}'}}
MESSAGES: list[dict[str, Any]] = [
    {"role": "assistant", "content": "How can I help?", "canned": True},
    {"role": "user", "content": "where is my bag?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "in Oslo", "tool_call_id": "1"},
    {"role": "assistant", "content": "It is in Oslo. " * 10},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "You are welcome."},
]


def written(folder: Path, *rows: dict[str, Any], name: str = "sessions.jsonl") -> Path:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
    return path


@pytest.mark.parametrize("name", ["sessions.jsonl", "sessions.jsonl.gz"])
def test_each_answer_of_the_model_is_a_turn(tmp_path: Path, name: str) -> None:
    row = {"session_id": "s", "prompt_ref": "policy", "messages": MESSAGES}
    (tmp_path / "prompts_and_tools.json").write_text(json.dumps({"prompts": {"policy": "Be kind."}}))
    (session,) = read(written(tmp_path, row, name=name), Shape(sessions=3))
    assert session.id == "s" and session.begin_s == 0.0
    assert [len(turn.messages) for turn in session.turns] == [3, 5, 7]
    assert session.turns[0].messages[0] == {"role": "system", "content": "Be kind."}
    assert session.turns[1].messages[3] == {"role": "assistant", "content": 'look_up({"id": 7})'}
    assert session.turns[1].messages[4] == {"role": "user", "content": "in Oslo"}
    assert [turn.output_tokens for turn in session.turns] == [8, 37, 8], "characters over four, at least eight"
    for turn, after in zip(session.turns, session.turns[1:], strict=False):
        assert after.messages[: len(turn.messages)] == turn.messages


def test_the_same_seed_gives_the_same_times(tmp_path: Path) -> None:
    path = written(tmp_path, *[{"session_id": str(number), "messages": MESSAGES} for number in range(5)])
    assert read(path, Shape()) == read(path, Shape()) != read(path, Shape(seed=1))
    assert [session.id for session in read(path, Shape(sessions=2, skip=2))] == ["2", "3"]
    still = read(path, Shape(begin_every_s=0, think_s=0))
    assert {session.begin_s for session in still} == {0.0}
    assert {turn.think_s for session in still for turn in session.turns} == {0.0}


def test_sessions_end_where_the_shape_says(tmp_path: Path) -> None:
    path = written(tmp_path, {"session_id": "s", "messages": MESSAGES})
    assert len(read(path, Shape(turns=2))[0].turns) == 2
    assert len(read(path, Shape(longest_chars=100))[0].turns) == 2, "the third has a longer prompt"


@pytest.mark.parametrize("rows", [[{"session_id": "s"}], [{"messages": [{}]}], [{"messages": []}], []])
def test_what_is_no_session_is_refused(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    path = written(tmp_path, *rows)
    with pytest.raises(ConfigError, match=str(path)):
        read(path, Shape())


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "none.jsonl", Shape())
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(ConfigError, match="cannot be read"):
        read(tmp_path / "bad.jsonl", Shape())
