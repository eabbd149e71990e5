"""What a records file says of prompts: which begin alike, by hashes that confirm no guess."""

from __future__ import annotations

import errno
import json
import os
import stat
import sys
import weakref
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

import pytest

from orla_lg import Backend, Orla
from orla_lg.core.accounting import journal, shapes
from orla_lg.core.accounting.journal import Appended, Journal
from orla_lg.core.accounting.shapes import KEY_BYTES, Shapes, key_file
from orla_lg.core.call import HASH_BYTES, NO_HINTS, Ask, Call
from orla_lg.core.identity import Identity
from tests.core.accounting.test_journal import record, rows
from tests.core.boundary.test_plain import Unfriendly

SYSTEM = {"role": "system", "content": "Answer the customer."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def call(*messages: Any, run: str | None = "r") -> Call:
    return Call("c", Identity("w", run, "s"), Ask("m", messages, max_tokens=7), NO_HINTS, NO_HINTS, 1.25)


def written(path: Path, calls: Sequence[Call]) -> list[dict[str, Any]]:
    """Return the shapes that a process writes of these calls, after what stands in the file."""
    before = len(rows(path)) if path.exists() else 0
    file = Journal(path)
    for each in calls:
        file.record(record("x"), each)
    file.close()
    return [row["shape"] for row in rows(path)[before:]]


def test_only_what_follows_the_last_known_piece_is_written(tmp_path: Path) -> None:
    first = (SYSTEM, user("one"))
    one, two, same = written(
        tmp_path / "r", [call(*first), call(*first, said("1"), user("two")), call(*first, said("1"), user("two"))]
    )
    assert [length for _, length in one["tail"]] == [27, 8] and "after" not in one
    assert two["after"] == one["tail"][-1][0] and two["after_chars"] == 35
    assert [piece[1:] for piece in two["tail"]] == [[11, 1], [8]], "an answer is marked"
    assert same["tail"] == [] and same["after"] == two["tail"][-1][0]
    assert (one["arrived_s"], one["max_tokens"], one["process"]) == (1.25, 7, two["process"])


def test_processes_that_append_to_one_file_have_one_key_and_two_files_have_two(tmp_path: Path) -> None:
    one, other = written(tmp_path / "r", [call(SYSTEM)]) + written(tmp_path / "r", [call(SYSTEM)])
    assert one["tail"] == other["tail"] and one["key"] == other["key"] and one["process"] != other["process"]
    (elsewhere,) = written(tmp_path / "s", [call(SYSTEM)])
    assert elsewhere["tail"] != one["tail"] and elsewhere["key"] != one["key"]


def test_a_guessed_prompt_cannot_be_confirmed_from_the_file(tmp_path: Path) -> None:
    secret = user("the patient's name is Ada")
    written(tmp_path / "r", [call(secret)])
    text = (tmp_path / "r").read_text()
    (shape,) = [row["shape"] for row in rows(tmp_path / "r")]
    assert "Ada" not in text and "patient" not in text
    guess = call(secret).ask.pieces[0][0].to_bytes(HASH_BYTES)
    in_file = {value for value in _strings(json.loads(text)) if value}
    keys = [b"", *(each.encode()[:64] for each in in_file)]
    keys += [bytes.fromhex(each)[:64] for each in in_file if len(each) % 2 == 0 and _is_hex(each)]
    assert shape["tail"][0][0] not in {
        blake2b(guess, digest_size=HASH_BYTES, key=key).hexdigest() for key in keys
    } | {guess.hex(), str(int.from_bytes(guess))}
    kept = key_file(tmp_path / "r").read_bytes()
    assert shape["tail"][0][0] == blake2b(guess, digest_size=HASH_BYTES, key=kept).hexdigest(), "with the key it can"


def _strings(value: Any) -> list[str]:
    if isinstance(value, dict):
        return [each for pair in value.items() for part in pair for each in _strings(part)]
    return [each for part in value for each in _strings(part)] if isinstance(value, list) else [str(value)]


def _is_hex(text: str) -> bool:
    return all(each in "0123456789abcdef" for each in text)


def test_the_key_is_its_owners_alone(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        written(tmp_path / "r", [call(SYSTEM)])
    finally:
        os.umask(before)
    assert stat.S_IMODE(key_file(tmp_path / "r").stat().st_mode) == 0o600
    assert len(key_file(tmp_path / "r").read_bytes()) == KEY_BYTES


@pytest.mark.parametrize("how", ["others may read it", "a link", "no key", "a folder"])
def test_a_key_that_protects_nothing_is_not_used(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shapes, "KEY_PAUSE_S", 0.0)
    kept, known = key_file(tmp_path / "r"), bytes(KEY_BYTES)
    match how:
        case "others may read it":
            kept.write_bytes(known)
            kept.chmod(0o644)
        case "a link":
            (tmp_path / "elsewhere").write_bytes(known)
            kept.symlink_to(tmp_path / "elsewhere")
        case "no key":
            kept.write_bytes(b"short")
            kept.chmod(0o600)
        case _:
            kept.mkdir()
    one, other = written(tmp_path / "r", [call(SYSTEM)]) + written(tmp_path / "r", [call(SYSTEM)])
    guess = call(SYSTEM).ask.pieces[0][0].to_bytes(HASH_BYTES)
    assert one["tail"][0][0] != blake2b(guess, digest_size=HASH_BYTES, key=known).hexdigest()
    assert one["key"] != other["key"], "each process has one of its own, in no file"
    assert caplog.text.count("can be compared within this process only") == 2


def test_what_the_disk_lost_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, append = Journal(tmp_path / "r"), Appended.append
    full = iter([True])

    def sometimes(self: Appended, lines: list[bytes]) -> tuple[int, OSError | None]:
        return (0, OSError(errno.ENOSPC, "full")) if next(full, False) else append(self, lines)

    monkeypatch.setattr(Appended, "append", sometimes)
    file.record(record("lost"), call(SYSTEM, user("one")))
    while not file.dropped:
        file.join(0.01)
    file.record(record("kept"), call(SYSTEM, user("one"), user("two")))
    file.close()
    (row,) = rows(tmp_path / "r")
    assert len(row["shape"]["tail"]) == 3 and "after" not in row["shape"]


def test_a_prompt_that_cannot_be_read_costs_its_shape_alone(tmp_path: Path) -> None:
    class Worse(Unfriendly):
        def __repr__(self) -> str:
            raise RuntimeError

    file = Journal(tmp_path / "r")
    file.record(record("a"), call(Worse()))
    file.record(record("b"), call(SYSTEM))
    file.close()
    assert [("shape" in row, row["id"]) for row in rows(tmp_path / "r")] == [(False, "a"), (True, "b")]


def test_behind_a_slow_disk_prompts_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "MOST_PROMPTS", 0)
    file = Journal(tmp_path / "r")
    file.record(record("a"), call(SYSTEM))
    file.close()
    assert "shape" not in rows(tmp_path / "r")[0]


def test_no_prompt_is_kept_once_its_line_is_written(tmp_path: Path) -> None:
    file, made = Journal(tmp_path / "r"), call(SYSTEM)
    kept = weakref.ref(made.ask)
    file.record(record("a"), made)
    del made
    while not (tmp_path / "r").exists() or not rows(tmp_path / "r"):
        file.join(0.01)
    file.join(0.05)
    assert kept() is None
    file.close()


def test_what_is_known_of_a_file_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "KNOWN", 4)
    made = Shapes(tmp_path / "r")
    known = [made.of(call(*(user(f"{turn} {n}") for n in range(3)))) for turn in range(5)]
    assert all(len(shape["tail"]) == 3 for shape in known) and len(made._known) <= 4


def test_the_path_of_a_call_is_as_long_with_a_shape_as_without(tmp_path: Path) -> None:
    def python_calls(given: Call | None) -> int:
        count = 0

        def note(frame: Any, event: str, _: object) -> None:
            nonlocal count
            count += event == "call"

        sys.setprofile(note)
        try:
            file.record(made, given)
        finally:
            sys.setprofile(None)
        return count

    file, made = Journal(tmp_path / "r"), record("a")
    file.record(made)
    assert python_calls(call(SYSTEM)) == python_calls(None)
    file.close()


def test_the_setting_stands_with_the_first_call_and_where_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal, "SETTING_EVERY_S", 0.0)
    file, setting = Journal(tmp_path / "r"), {"admission": True}
    file.setting = lambda: dict(setting)
    for name in ("a", "b"):
        file.record(record(name), call(SYSTEM))
    while len(rows(tmp_path / "r") if (tmp_path / "r").exists() else []) < 2:
        file.join(0.01)
    setting["admission"] = False
    file.record(record("c"), call(SYSTEM))
    file.close()
    assert [row["shape"].get("setting") for row in rows(tmp_path / "r")] == [
        {"admission": True}, None, {"admission": False},
    ]  # fmt: skip


def test_a_core_without_a_records_file_makes_none_of_it(tmp_path: Path) -> None:
    with Orla([Backend("light", "http://127.0.0.1:9/v1")]) as orla:
        assert orla.core.serving.records.written is None  # type: ignore[attr-defined]
    assert not list(tmp_path.iterdir())
