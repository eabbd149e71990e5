"""Public traces of arrivals: Mooncake's JSON lines and Azure's CSV. They say what came, and not what happened."""

from __future__ import annotations

import csv
import gzip
import io
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from math import isfinite
from pathlib import Path
from typing import Any

from orla_lg.core.boundary.plain import shown
from orla_lg.core.call import CHARS_PER_TOKEN
from orla_lg.errors import ConfigError
from orla_lg.replay.traffic import MOST_PIECES, MOST_SECONDS, MOST_TOKENS, Piece, RecordedCall, RecordedTraffic

MOONCAKE_TOKENS = 512
"""What one of ``hash_ids`` stands for."""

MOST_LINE_CHARS = 16_000_000
FORMATS = ("records", "mooncake", "azure")
BACKEND = "engine"
"""Where all calls of a trace go."""


def read(path: Path, form: str, limit: int | None = None) -> RecordedTraffic:
    """Read a public trace, plain or as ``.gz``.

    Args:
        path: The file.
        form: ``mooncake`` or ``azure``.
        limit: So many calls at most, the first ones.

    Raises:
        ConfigError: It cannot be read, or holds no arrival.
    """
    seen = RecordedTraffic(str(path), happened=False)
    try:
        with _opened(path) as text:
            rows = _mooncake(text, seen) if form == "mooncake" else _azure(text, seen)
            found = []
            for row in rows:
                found.append(row)
                if limit is not None and len(found) >= limit:
                    break
    except (OSError, EOFError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
    if not found:
        right = (
            "timestamp, input_length, output_length, hash_ids in JSON lines"
            if form == "mooncake"
            else "TIMESTAMP, ContextTokens, GeneratedTokens in CSV"
        )
        why = "; ".join(seen.faults) or f"expected {right}"
        raise ConfigError(f"{path} holds no arrival of the form {form}: {why}")
    seen.calls = [_call(number, *row) for number, row in enumerate(_spread(found))]
    return seen


_Row = tuple[float, int, int, Piece | None]


@contextmanager
def _opened(path: Path) -> Iterator[io.TextIOBase]:
    with path.open("rb") as raw:
        packed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        data: Any = gzip.GzipFile(fileobj=raw) if packed else raw
        with io.TextIOWrapper(data, encoding="utf-8-sig", errors="replace", newline="") as text:
            yield text


def _call(number: int, at_s: float, prompt: int, answer: int, last: Piece | None) -> RecordedCall:
    return RecordedCall(
        id=f"arrival-{number}", workflow=f"arrival-{number}", run=None, stage="", backend=BACKEND, arrived_s=at_s,
        duration_s=0.0, prompt_tokens=prompt, completion_tokens=answer, prompt=last,
    )  # fmt: skip


def _mooncake(text: io.TextIOBase, seen: RecordedTraffic) -> Iterator[_Row]:
    pieces: dict[int, Piece] = {}
    number = 0
    while line := text.readline(MOST_LINE_CHARS):
        number += 1
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = _tokens(row, "input_length"), _tokens(row, "output_length")
            yield _number(row["timestamp"]) / 1000, prompt, answer, _blocks(row.get("hash_ids") or (), pieces)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            seen.fault(number, f"is no arrival: {shown(repr(error), 100)}")


def _blocks(ids: Any, pieces: dict[int, Piece]) -> Piece | None:
    if not isinstance(ids, list | tuple) or len(ids) > MOST_PIECES:
        raise ValueError(f"hash_ids must be at most {MOST_PIECES} numbers")
    last: Piece | None = None
    for each in ids:
        if isinstance(each, bool) or not isinstance(each, int) or not 0 <= each < 2**63:
            raise ValueError(f"hash_ids: {shown(each, 40)} is no id")
        if (known := pieces.get(each)) is None:
            known = pieces[each] = Piece.after(last, each + 1, MOONCAKE_TOKENS * CHARS_PER_TOKEN)
            known.until_tokens = known.depth * MOONCAKE_TOKENS
        last = known
    return last


def _azure(text: io.TextIOBase, seen: RecordedTraffic) -> Iterator[_Row]:
    for number, row in enumerate(csv.DictReader(text), 2):
        try:
            prompt = _tokens(row, "ContextTokens" if "ContextTokens" in row else "input_tokens")
            answer = _tokens(row, "GeneratedTokens" if "GeneratedTokens" in row else "output_tokens")
            yield _moment(row), prompt, answer, None
        except (ValueError, TypeError, KeyError, OverflowError) as error:
            seen.fault(number, f"is no arrival: {shown(repr(error), 100)}")


def _moment(row: Mapping[str, Any]) -> float:
    if "timestamp_ms" in row:
        return _number(float(row["timestamp_ms"])) / 1000
    whole, _, fraction = row["TIMESTAMP"].strip().partition(".")  # seven digits, more than Python reads
    return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")


def _tokens(row: Mapping[str, Any], name: str) -> int:
    value = _number(float(row[name]))
    if value > MOST_TOKENS:
        raise ValueError(f"{name} must be at most {MOST_TOKENS:,}")
    return max(1, int(value))


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not isfinite(value) or value < 0:
        raise ValueError(f"{shown(value, 40)} is no number of 0 or more")
    return float(value)


def _spread(rows: list[_Row]) -> Iterator[_Row]:
    """Yield rows by time from 0 on; those of one tick of a coarse clock evenly within it."""
    rows.sort(key=lambda row: row[0])
    begin_s, at = rows[0][0], 0
    while at < len(rows):
        same = at
        while same < len(rows) and rows[same][0] == rows[at][0]:
            same += 1
        width_s = (rows[same][0] - rows[at][0]) if same < len(rows) else 0.0
        for index in range(at, same):
            at_s = rows[index][0] - begin_s + width_s * (index - at) / (same - at)
            if at_s <= MOST_SECONDS:
                yield (at_s, *rows[index][1:])
        at = same
