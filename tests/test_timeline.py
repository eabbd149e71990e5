"""Calls as lines of time: exact text on fixed records, and what a broken file may hold."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from orla_lg import cli, timeline
from orla_lg.timeline import Span

WIDTH = 72


def row(
    stage: str, end: float, *, wait: float = 0.0, ttft: float | None = 0.5, took: float = 1.0, **fields: Any
) -> Any:
    return {
        "id": f"{stage}-{end}", "at": f"2026-05-04T10:00:{end:06.3f}+00:00", "run": "5c1f-1", "workflow": "ann",
        "stage": stage, "backend": "heavy", "queue_wait_s": wait, "ttft_s": ttft, "duration_s": took,
        "prompt_tokens": 100, "cached_tokens": 60, "completion_tokens": 15, "attempts": 1, "error": None,
    } | fields  # fmt: skip


RUN = [
    row("classify", 1.0, wait=0.2, ttft=0.4, took=1.0, cached_tokens=0),
    row("policy_check", 3.0, wait=1.0, ttft=0.6, took=1.9, prompt_tokens=640, cached_tokens=0),
    row("route_ticket", 4.0, wait=2.4, ttft=0.2, took=2.9, prompt_tokens=655, cached_tokens=600),
    row("policy_check", 3.7, wait=0.0, ttft=0.1, took=0.6, prompt_tokens=900, cached_tokens=680),
    row("reply", 6.0, wait=0.0, ttft=0.5, took=2.0, prompt_tokens=1000, cached_tokens=920, error="Broken: off"),
]

ONE_CALL = """\
························▒▒▒▒▒▒▒▒▒▒▒▒████████████████████████████████████
└───────────┴───────────┴───────────┴───────────┴───────────┴──────────┴
0.0         0.5         1.0         1.5         2.0         2.5    3.0 s

· queued     1.000 s
▒ prefill    0.500 s  40 of 100 prompt tokens computed, 60 cached
█ decode     1.500 s  15 tokens answered, 10.0 a second"""

ONE_RUN = """\
classify      ·▒▒██                         1.00 s    0 of  100 cached
policy_check       ·····▒▒▒█                1.90 s    0 of  640 cached
route_ticket       ···········▒██           2.90 s  600 of  655 cached
policy_check                ▒██             0.60 s  680 of  900 cached
reply                            ▒▒███████  2.00 s  920 of 1000 cached ✗
              └────────┴─────────┴───────┴
              0        2         4     6 s

· queued  ▒ prefill  █ decode"""

NARROW = """\
classify      ·▒▒▒██
policy_check         ······▒▒▒██
route_ticket         ··············▒██
policy_check                     ███
reply                                 ▒▒▒█████████
              └───────────┴───────────┴──────────┴
              0           2           4        6 s

· queued  ▒ prefill  █ decode"""

ASCII = """\
classify                  .:::##              1.00 s   0 of 100 cached
?ng_stage_name|with_more              .       0.01 s                   x
x                                     %%%%%%  1.00 s  60 of 100 cached
                          +-----------+-----
                          0           2 s

. queued  : prefill  # decode  % served"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "records.jsonl"
    other = row("elsewhere", 0.5, took=0.2, run="9d", id="other")
    path.write_text("".join(json.dumps(each) + "\n" for each in (other, *RUN)) + '{"id": "torn')
    return path


def explain(*args: str | Path) -> int:
    return cli.main(["explain", *map(str, args)])


def drawn(*rows: Any, width: int = WIDTH) -> str:
    return timeline.plain(timeline.chart(map(Span.of, rows), width))


def test_one_call_is_a_line_over_its_axis_and_says_what_each_phase_took() -> None:
    assert timeline.plain(timeline.call(Span.of(row("reply", 5.0, wait=1.0, ttft=0.5, took=3.0)), WIDTH)) == ONE_CALL


def test_a_run_is_its_calls_under_one_another() -> None:
    assert drawn(*RUN) == ONE_RUN


def test_a_narrow_terminal_gets_the_lines_without_the_figures() -> None:
    assert drawn(*RUN, width=50) == NARROW


def test_where_the_encoding_has_no_blocks_the_picture_is_ascii_and_nothing_is_lost() -> None:
    refused = row("a|very_long_stage_name|with_more", 2.0, backend=None, took=0.01, cached_tokens=None, error="Full")
    spans = [Span.of(each) for each in (RUN[0], refused, row("x", 3.0, ttft=None))]
    assert timeline.plain(timeline.chart(spans, WIDTH), "latin-1") == ASCII


@pytest.mark.parametrize("width", [1, 40, 57, 80, 133, 5000])
def test_no_line_is_wider_than_the_terminal_and_every_call_is_seen(width: int) -> None:
    rows = [
        row(f"stage{n}", 1.0 + n / 7, wait=n / 50, ttft=None if n % 5 == 0 else 0.001, took=n / 40) for n in range(40)
    ]
    lines = drawn(*rows, width=width).splitlines()
    assert max(map(len, lines)) <= max(timeline.LEAST, min(timeline.MOST, width))
    bars = [line for line in lines if line.startswith("stage")]
    assert len(bars) == 40 and all(re.search("[·▒█▓]", bar) for bar in bars)
    one = timeline.plain(timeline.call(Span.of(rows[39]), width)).splitlines()
    assert max(map(len, one[:3])) <= max(timeline.LEAST, min(timeline.MOST, width))


@pytest.mark.parametrize(
    "broken",
    [
        {"at": "yesterday"}, {"at": None}, {"at": 7},
        {"duration_s": "long"}, {"duration_s": -1.0}, {"duration_s": 1e300},
        {"duration_s": float("nan")}, {"queue_wait_s": 9.0}, {"ttft_s": 9.0}, {"ttft_s": "x"},
        {"stage": None}, {"stage": 7},
        {"stage": "\x1b[31mred"}, {"prompt_tokens": "many"}, {"cached_tokens": True}, {"attempts": None},
        {"error": 3}, {"backend": None, "external": True},
    ],
)  # fmt: skip
def test_a_line_of_anothers_making_is_drawn_as_far_as_it_goes(broken: dict[str, Any]) -> None:
    span = Span.of(row("reply", 2.0) | broken)
    assert span.duration_s >= 0
    for lines in (timeline.call(span, WIDTH), timeline.chart([span, Span.of(RUN[0])], WIDTH)):
        assert "\x1b" not in timeline.plain(lines)


def test_nothing_is_a_chart_of_nothing() -> None:
    assert timeline.chart([], WIDTH) == []


def test_phases_of_calls_that_were_not_streamed_not_placed_or_tried_again() -> None:
    said = timeline.plain(timeline.call(Span.of(row("x", 1.0, ttft=None, attempts=3)), 60))
    assert "▓ served     1.000 s  40 of 100 prompt tokens computed, 60 cached; 15 tokens answered" in said
    assert "3 attempts; the time of those that failed lies in the last phase" in said
    refused = timeline.plain(timeline.call(Span.of(row("x", 1.0, backend=None, error="QueueFull: no")), 60))
    assert refused.splitlines()[-2:] == ["· queued     1.000 s", "✗ QueueFull: no"]


# In the terminal


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_colours_and_a_pipe_the_same_text_without_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    lines = timeline.chart(map(Span.of, RUN), WIDTH)
    bright = timeline.for_stream(lines, Terminal())
    assert "\x1b[32m██" in bright and re.sub("\x1b\\[[0-9;]*m", "", bright) == ONE_RUN
    assert timeline.for_stream(lines, io.StringIO()) == ONE_RUN
    monkeypatch.setenv("NO_COLOR", "1")
    assert timeline.for_stream(lines, Terminal()) == ONE_RUN


def test_explain_draws_a_call_in_the_width_of_the_terminal(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert explain("route_ticket", "--records", file) == 0
    said = capsys.readouterr().out
    assert said.startswith("record route_ticket-4.0  ended")
    assert said.endswith(f"\n\n{timeline.plain(timeline.call(Span.of(RUN[2]), WIDTH))}\n")


@pytest.mark.parametrize(
    "args",
    [["--run", "FILE"], ["FILE", "--run"], ["--run", "5c1", "FILE"], ["--run", "last", "--records", "FILE"],
     ["--run", "--records", "FILE"], ["FILE", "--run", "5c1f-1"], ["FILE", "--run", "ann"]],
)  # fmt: skip
def test_explain_draws_a_run(
    file: Path, args: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(WIDTH))
    assert explain(*(file if arg == "FILE" else arg for arg in args)) == 0
    head = "run 5c1f-1 of workflow ann\n5 calls of 4 stages in 6.00 s; 3295 prompt tokens, 2200 of them cached\n\n"
    assert capsys.readouterr().out == head + ONE_RUN + "\n"


def test_a_run_as_json_is_its_records(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert explain("--run", "5c", "--records", file, "--json") == 0
    assert [json.loads(line)["stage"] for line in capsys.readouterr().out.splitlines()] == [
        each["stage"] for each in RUN
    ]


@pytest.mark.parametrize(
    ("args", "message", "status"),
    [
        (["--run", "zzz"], "no run whose id begins with 'zzz'", 1),
        (["--run", ""], "9d, 5c1f-1 …; give more of the id", 1),
        (["--run", "5c", "--stage", "reply"], "leave out --stage", 2),
        (["reply", "--run", "5c"], "leave out the record 'reply'", 2),
    ],
)
def test_runs_that_cannot_be_drawn(
    file: Path, args: list[str], message: str, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert explain(*args, "--records", file) == status
    assert message in capsys.readouterr().err


def test_a_file_without_runs_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text(json.dumps(row("x", 1.0, run=None)) + "\n")
    assert explain("--run", path) == 1
    assert "no call of a run in" in capsys.readouterr().err


def test_the_picture_for_a_page_is_text_of_its_own(file: Path, tmp_path: Path) -> None:
    pytest.importorskip("rich")
    assert explain("--run", "5c", "--records", file, "--save-svg", tmp_path / "run.svg") == 0
    drawing = (tmp_path / "run.svg").read_text()
    assert "route_ticket" in drawing and "@font-face" not in drawing and "cdnjs" not in drawing
