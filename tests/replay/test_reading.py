"""Records as files have them: of this version, of older ones, broken, and made to do harm."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from orla_lg.errors import ConfigError
from orla_lg.replay import reading
from orla_lg.replay.reading import read
from orla_lg.replay.traffic import RecordedTraffic

AT = "2026-01-01T00:00:{:06.3f}+00:00"


def row(number: int = 0, *, end_s: float = 10.0, **fields: Any) -> dict[str, Any]:
    """Return a record as an older version wrote it."""
    return {
        "at": AT.format(end_s), "id": f"a-{number}", "workflow": "w", "run": "r", "stage": "s", "backend": "b",
        "duration_s": 2.0, "queue_wait_s": 0.5, "ttft_s": 0.5, "prompt_tokens": 100, "completion_tokens": 10,
        "cached_tokens": 0, **fields,
    }  # fmt: skip


def shape(tail: list[list[Any]], *, at_s: float = 0.0, process: str = "p", **fields: Any) -> dict[str, Any]:
    return {"process": process, "arrived_s": at_s, "key": "k", "tail": tail, **fields}


def file(folder: Path, *lines: dict[str, Any] | str | bytes) -> Path:
    path = folder / "records.jsonl"
    made = [line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
            for line in lines]  # fmt: skip
    path.write_bytes(b"\n".join(made) + b"\n")
    return path


def prompts(seen: RecordedTraffic) -> list[list[int]]:
    """Return for each call its prompt's pieces as numbers that are equal for equal beginnings."""
    known: dict[int, int] = {}
    found = []
    for call in seen.calls:
        piece, mine = call.prompt, list[int]()
        while piece is not None:
            mine.insert(0, known.setdefault(piece.name, len(known)))
            piece = piece.before
        found.append(mine)
    return found


def test_prompts_are_put_together_from_the_lines_before(tmp_path: Path) -> None:
    path = file(
        tmp_path,
        row(0, shape=shape([["aa", 40], ["bb", 10]])),
        row(1, shape=shape([["cc", 5, 1], ["dd", 7]], at_s=3.0, after="bb", after_chars=50)),
        row(2, shape=shape([["ee", 9]], at_s=6.0, after="aa", after_chars=40)),
    )
    seen = read(path)
    first, second, third = (call.prompt for call in seen.calls)
    assert first and second and third
    assert (first.until_chars, second.until_chars, third.until_chars) == (50, 62, 49)
    assert second.before and second.before.is_answer and second.before.before is first
    assert third.before is first.before
    assert not seen.without_shape and not seen.lost_beginnings


def test_a_prompt_that_begins_in_another_file_is_counted(tmp_path: Path) -> None:
    seen = read(file(tmp_path, row(0, shape=shape([["dd", 7]], after="zz", after_chars=90))))
    assert seen.lost_beginnings == 1 and seen.calls[0].prompt and seen.calls[0].prompt.until_chars == 97


def test_hashes_of_two_keys_are_never_equal(tmp_path: Path) -> None:
    one, other = row(0, shape=shape([["aa", 4]])), row(1, shape=shape([["aa", 4]]) | {"key": "another"})
    (mine,), (theirs,) = prompts(read(file(tmp_path, one, other)))
    assert mine != theirs


def test_an_older_record_came_when_it_ended_less_its_duration(tmp_path: Path) -> None:
    seen = read(file(tmp_path, row(0, end_s=10.0), row(1, end_s=11.5, duration_s=1.0), {"amends": "a-0"}))
    assert [call.arrived_s - seen.calls[0].arrived_s for call in seen.calls] == [0.0, 2.5]
    assert seen.without_shape == 2 and seen.setting is None


def test_the_clocks_of_processes_are_brought_together(tmp_path: Path) -> None:
    # One process's clock says 5 s where the wall clock says 8 s, the other's 1,000 s where it says 20 s.
    one = row(0, end_s=10.0, shape=shape([], at_s=5.0, process="one"))
    other = row(1, end_s=22.0, shape=shape([], at_s=1000.0, process="other"))
    seen = read(file(tmp_path, one, other))
    assert seen.calls[1].arrived_s - seen.calls[0].arrived_s == pytest.approx(12.0)


def test_one_clock_is_taken_as_it_is_whenever_its_lines_were_written(tmp_path: Path) -> None:
    seen = read(file(tmp_path, *(row(n, shape=shape([], at_s=100.0 * n)) for n in range(3))))
    assert [call.arrived_s for call in seen.calls] == [0.0, 100.0, 200.0]


def test_a_setting_is_read(tmp_path: Path) -> None:
    backend = {
        "engine": "vllm", "max_concurrency": 4, "capacity": 10, "kv_tokens": 7680, "stage_policy": "las",
        "request_policy": {"*": "fcfs"}, "prices": [1.0, 2.0, None], "can": ["pin"],
    }  # fmt: skip
    said = {"backends": {"b": backend}, "admission": False, "memory": "ReleaseOnly"}
    seen = read(file(tmp_path, row(0, shape=shape([], setting=said)), row(1, shape=shape([]))))
    assert seen.setting is not None and not seen.setting.admission and seen.settings == 1
    found = seen.setting.backends["b"]
    assert (found.kv_tokens, found.stage_policy, found.prices) == (7680, "las", (1.0, 2.0, None))


BROKEN: dict[str, tuple[str | bytes | dict[str, Any], str]] = {
    "no JSON": ("{", "is no JSON"),
    "half a line": (json.dumps(row(9))[:50], "is no JSON"),
    "bytes": (b"\xff\xfe\x00", "is no JSON"),
    "a list": ("[1]", "is no JSON object"),
    "deep": ('{"id":' + "[" * 200_000, "nested too deeply"),
    "deep and whole": ('{"id": "x", "considered": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deeply"),
    "many digits": ('{"id": "x", "prompt_tokens": ' + "9" * 5000 + "}", "is no record"),
    "no time": (row(9) | {"at": "yesterday"}, "at must be a time"),
    "a time of another kind": (row(9) | {"at": 3}, "at must be a time"),
    "tokens below nothing": (row(9) | {"prompt_tokens": -1}, "prompt_tokens must be a whole number"),
    "huge": (row(9) | {"prompt_tokens": 10**12}, "prompt_tokens must be a whole number from 0 to 2,000,000"),
    "half tokens": (row(9) | {"completion_tokens": 1.5}, "completion_tokens must be a whole number"),
    "true": (row(9) | {"duration_s": True}, "duration_s must be a number"),
    "for ever": ('{"id": "x", "at": "2026-01-01", "duration_s": Infinity}', "duration_s must lie between"),
    "no number": ('{"id": "x", "at": "2026-01-01", "duration_s": NaN}', "duration_s must lie between"),
    "a shape that is none": (row(9) | {"shape": 3}, "shape must be an object"),
    "a tail that is none": (row(9) | {"shape": shape([["aa"]])}, "each piece is"),
    "a piece of endless length": (row(9) | {"shape": shape([["aa", 10**18]])}, "a piece's length must be"),
    "many backends": (
        row(9) | {"shape": shape([], setting={"backends": {str(n): {} for n in range(1000)}})}, "at most 100",
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_line_is_named_and_passed_over(tmp_path: Path, what: str) -> None:
    line, why = BROKEN[what]
    seen = read(file(tmp_path, row(0), line, row(1)))
    assert [call.id for call in seen.calls] == ["a-0", "a-1"] and seen.broken == 1
    assert seen.faults[0].startswith("line 2 ") and why in seen.faults[0]
    assert len(seen.faults[0]) < 500


def test_a_file_without_a_record_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no call's record: line 1 is no JSON.*--format mooncake"):
        read(file(tmp_path, "timestamp,tokens"))
    with pytest.raises(ConfigError, match="no line with an `id`"):
        read(file(tmp_path, {"feedback": "a-1"}))
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        read(tmp_path / "none")


def test_a_packed_file_that_breaks_off_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    path = tmp_path / "r.gz"
    path.write_bytes(
        gzip.compress("".join(json.dumps(row(n, reason=f"{n * 7919}")) + "\n" for n in range(2999)).encode())[:-3000]
    )
    seen = read(path)
    assert len(seen.calls) > 100 and "breaks off" in seen.faults[-1]


def test_so_many_calls_are_read_as_are_asked_for(tmp_path: Path) -> None:
    assert len(read(file(tmp_path, *(row(n) for n in range(9))), limit=4).calls) == 4


def test_no_number_in_a_file_sizes_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_LINE_BYTES", 100_000)
    huge = {"backends": {"b": {"kv_tokens": 10**9, "context_tokens": 10**9, "capacity": 10**8, "slots": 4096}}}
    most = shape([["aa", 100_000_000]], setting=huge)
    path = file(
        tmp_path, row(0, prompt_tokens=2_000_000, completion_tokens=2_000_000, shape=most), "x" * 5_000_000,
        *(row(n, step=2_000_000) for n in range(1, 50)),
    )  # fmt: skip
    tracemalloc.start()
    try:
        seen = read(path)
        assert tracemalloc.get_traced_memory()[1] < 2_000_000
    finally:
        tracemalloc.stop()
    assert len(seen.calls) == 50 and "longer than" in seen.faults[0]
