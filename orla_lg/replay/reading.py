"""Records as they stand in a file, of this version or an older one; a broken line is named and passed over."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import datetime
from hashlib import blake2b
from pathlib import Path
from typing import Any, BinaryIO, cast

from orla_lg.core.boundary.plain import shown
from orla_lg.core.call import HASH_BYTES
from orla_lg.core.identity import workflow_key
from orla_lg.errors import ConfigError
from orla_lg.replay.traffic import (
    MOST_BACKENDS,
    MOST_CHARS,
    MOST_PIECES,
    MOST_SECONDS,
    MOST_TOKENS,
    BackendSetting,
    Piece,
    RecordedCall,
    RecordedSetting,
    RecordedTraffic,
)

MOST_LINE_BYTES = 16_000_000
"""Of one line; a longer one is passed over, and not kept."""

MOST_NAME_CHARS = 1_000
MOST_STAGES = 1_000


class Broken(ValueError):
    """A line says what cannot be; the message says what, and what would be right."""


def read(path: Path, limit: int | None = None, progress: Callable[[int], None] = lambda _: None) -> RecordedTraffic:
    """Read a records file, plain or as ``.gz``.

    Args:
        path: The file.
        limit: So many calls at most, the first ones.
        progress: Called now and then with how many lines were read.

    Raises:
        ConfigError: It cannot be read, or there is no call's record in it.
    """
    seen = RecordedTraffic(str(path))
    lines = _Lines(seen)
    for number, line in _lines(path, seen):
        if not number % 1000:
            progress(number)
        try:
            lines.take(line)
        except Broken as error:
            seen.fault(number, str(error))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            seen.fault(number, f"is no JSON: {error}")
        except RecursionError:
            seen.fault(number, "is nested too deeply for a record")
        except ValueError as error:  # a number of thousands of digits, which Python does not read
            seen.fault(number, f"is no record: {shown(str(error), 100)}")
        if limit is not None and len(lines.calls) >= limit:
            break
    lines.finish()
    if not seen.calls:
        why = "; ".join(seen.faults) or "there is no line with an `id` in it"
        raise ConfigError(
            f"{path} holds no call's record: {why}. Is it what `records_file` names? "
            "Public traces are read with --format mooncake or azure"
        )
    return seen


def _lines(path: Path, seen: RecordedTraffic) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file with their numbers; one that is too long is a fault, whose bytes are let go."""
    number, too_long = 0, False
    try:
        with path.open("rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
            plain.seek(0)
            opened = cast("BinaryIO", gzip.GzipFile(fileobj=plain)) if packed else plain
            while part := opened.readline(MOST_LINE_BYTES):
                begins, whole = not too_long, part.endswith(b"\n")
                number += begins
                if begins and (whole or len(part) < MOST_LINE_BYTES):
                    if part.strip():
                        yield number, part
                elif begins:
                    seen.fault(number, f"is longer than {MOST_LINE_BYTES:,} bytes; no record is")
                too_long = not whole
    except (OSError, EOFError) as error:
        if number:  # a packed file
            seen.fault(number, f"is the last one: the file breaks off there ({error})")
            return
        raise ConfigError(f"{path} cannot be read: {getattr(error, 'strerror', None) or error}") from error


class _Lines:
    """Makes calls of lines; their clocks are brought together at the end."""

    def __init__(self, seen: RecordedTraffic) -> None:
        self.seen = seen
        self.calls: list[tuple[str, float, RecordedCall]] = []
        """Each with its process, empty for an older record, and when its line was written, on the wall clock."""
        self._pieces: dict[tuple[str, str], Piece] = {}
        self._settings: dict[str, RecordedSetting] = {}

    def take(self, line: bytes) -> None:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise Broken("is no JSON object")
        if "id" not in row:  # a score, an amendment, a tool: nothing that a replay needs
            return
        at_s, shape = _instant(row.get("at")), row.get("shape")
        duration_s = _seconds(row, "duration_s", 0.0)
        given = {} if shape is None else _object(shape, "shape")
        arrived_s = _time(given, "arrived_s", at_s - duration_s)
        call = RecordedCall(
            id=_name(row, "id"),
            workflow=workflow_key(_name(row, "workflow") or f"call-{_name(row, 'id')}", _name(row, "tenant") or None),
            run=_name(row, "run") or None,
            stage=_name(row, "stage"),
            backend=_name(row, "backend") or None,
            arrived_s=arrived_s,
            duration_s=duration_s,
            queue_wait_s=min(duration_s, _seconds(row, "queue_wait_s", 0.0)),
            ttft_s=None if row.get("ttft_s") is None else _seconds(row, "ttft_s", 0.0),
            prompt_tokens=_count(row, "prompt_tokens", MOST_TOKENS),
            cached_tokens=_count(row, "cached_tokens", MOST_TOKENS),
            completion_tokens=_count(row, "completion_tokens", MOST_TOKENS),
            priority=_number(row, "priority", 0.0, MOST_SECONDS, least=-MOST_SECONDS),
            tenant=_name(row, "tenant") or None,
            cache_hint=row.get("cache_hint") if row.get("cache_hint") in ("preserve", "flush", "auto") else None,
            cost_usd=None if row.get("cost_usd") is None else _number(row, "cost_usd", 0.0, MOST_SECONDS),
            error=_name(row, "error") or None,
            external=row.get("external") is True,
            step=_count(row, "step", MOST_TOKENS),
            prompt=self._prompt(given),
            max_tokens=_count(given, "max_tokens", MOST_TOKENS),
            deadline_s=None if given.get("deadline_s") is None else _seconds(given, "deadline_s", 0.0),
            graph=_name(given, "graph"),
            run_arrived_s=None if "run_arrived_s" not in given else _time(given, "run_arrived_s", arrived_s),
        )
        if "setting" in given:
            self._note(_setting(_object(given["setting"], "setting")))
        self.seen.without_shape += shape is None
        self.calls.append((_name(given, "process"), at_s, call))

    def _note(self, setting: RecordedSetting) -> None:
        self._settings[repr(setting)] = setting
        self.seen.setting = setting
        self.seen.settings = len(self._settings)

    def _prompt(self, shape: Mapping[str, Any]) -> Piece | None:
        """Return a prompt's last piece; what it begins with may stand in an earlier line."""
        if not isinstance(tail := shape.get("tail"), list):
            return None
        key, last = _name(shape, "key"), None
        if (after := _name(shape, "after")) and (last := self._pieces.get((key, after))) is None:
            self.seen.lost_beginnings += 1
            chars = _count(shape, "after_chars", MOST_CHARS) or 0
            last = self._pieces[key, after] = Piece.after(None, _named(key, after), chars)
        if len(tail) + (last.depth if last else 0) > MOST_PIECES:
            return None
        for each in tail:
            if not (isinstance(each, list) and len(each) in (2, 3) and isinstance(each[0], str)):
                raise Broken("shape.tail: each piece is [hash, length] or [hash, length, 1]")
            name, length = each[0][:64], _count({"a piece's length": each[1]}, "a piece's length", MOST_CHARS)
            known = self._pieces.get((key, name))
            if known is None:
                known = Piece.after(last, _named(key, name), length or 0, is_answer=len(each) == 3)
                self._pieces[key, name] = known
            last = known
        return last

    def finish(self) -> None:
        """Bring the clocks of all processes together, and sort by arrival."""
        offsets: dict[str, float] = {}
        for process, at_s, call in self.calls:
            late_s = at_s - call.ended_s
            offsets[process] = min(late_s, offsets.get(process, late_s))
        if len(offsets) == 1:
            offsets = dict.fromkeys(offsets, 0.0)
        moved = [
            replace(
                call, arrived_s=call.arrived_s + offsets[process],
                run_arrived_s=None if call.run_arrived_s is None else call.run_arrived_s + offsets[process],
            )
            for process, _, call in self.calls
        ]  # fmt: skip
        moved.sort(key=lambda call: call.arrived_s)
        if moved and moved[-1].arrived_s - moved[0].arrived_s > MOST_SECONDS:
            raise ConfigError(f"{self.seen.source}: its calls lie further apart than {MOST_SECONDS:,.0f} s")
        self.seen.calls = moved


def _named(key: str, name: str) -> int:
    return int.from_bytes(blake2b(f"{key}/{name}".encode(), digest_size=HASH_BYTES).digest())


def _setting(row: Mapping[str, Any]) -> RecordedSetting:
    backends = _object(row.get("backends"), "setting.backends")
    if len(backends) > MOST_BACKENDS:
        raise Broken(f"setting: {len(backends)} backends, at most {MOST_BACKENDS} are read")
    made = {str(name): _backend(str(name), _object(each, f"setting of {name}")) for name, each in backends.items()}
    return RecordedSetting(made, row.get("admission") is not False, _name(row, "memory") or "default")


def _backend(name: str, row: Mapping[str, Any]) -> BackendSetting:
    by_stage = _object(row.get("request_policy") or {}, "request_policy")
    can, prices = row.get("can"), row.get("prices")
    return BackendSetting(
        name=name,
        engine=_name(row, "engine"),
        max_concurrency=_count(row, "max_concurrency", MOST_CHARS),
        capacity=_count(row, "capacity", MOST_CHARS) or 10_000,
        kv_tokens=_count(row, "kv_tokens", 1_000_000_000),
        context_tokens=_count(row, "context_tokens", 1_000_000_000),
        slots=_count(row, "slots", 4_096),
        stage_policy=_name(row, "stage_policy") or "workflow_fcfs",
        request_policy={str(stage): str(each) for stage, each in list(by_stage.items())[:MOST_STAGES]},
        prices=_prices(prices) if isinstance(prices, list) else None,
        can=frozenset(each for each in can if isinstance(each, str)) if isinstance(can, list) else frozenset(),
    )


def _prices(said: list[Any]) -> tuple[float, float, float | None]:
    if len(said) != 3:
        raise Broken("setting: prices are [input, output, cached input]")
    given = dict(zip(("input", "output", "cached input"), said, strict=True))
    cached = None if given["cached input"] is None else _number(given, "cached input", 0.0, MOST_SECONDS)
    return _number(given, "input", 0.0, MOST_SECONDS), _number(given, "output", 0.0, MOST_SECONDS), cached


def _object(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Broken(f"{what} must be an object, got {shown(value, 60)}")
    return value


def _name(row: Mapping[str, Any], name: str) -> str:
    value = row.get(name)
    return "" if value is None else value[:MOST_NAME_CHARS] if isinstance(value, str) else shown(value, 100)


def _number(row: Mapping[str, Any], name: str, missing: float, most: float, least: float = 0.0) -> float:
    value = row.get(name)
    if value is None:
        return missing
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise Broken(f"{name} must be a number, got {shown(value, 60)}")
    if not (least <= value <= most) or not math.isfinite(value):
        raise Broken(f"{name} must lie between {least:g} and {most:g}, got {shown(str(value), 40)}")
    return float(value)


def _seconds(row: Mapping[str, Any], name: str, missing: float) -> float:
    return _number(row, name, missing, MOST_SECONDS)


def _time(row: Mapping[str, Any], name: str, missing: float) -> float:
    return _number(row, name, missing, 1e12, least=-1e12)


def _count(row: Mapping[str, Any], name: str, most: int) -> int | None:
    value = row.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= most:
        raise Broken(f"{name} must be a whole number from 0 to {most:,}, got {shown(value, 40)}")
    return value


def _instant(said: Any) -> float:
    try:
        return datetime.fromisoformat(said).timestamp()
    except (TypeError, ValueError, OverflowError) as error:
        raise Broken(f"at must be a time as in 2026-01-31T12:00:00.000+00:00, got {shown(said, 60)}") from error
