"""Workloads: requests that come when they come, read from a file the user gives, in a public trace's form.

Two forms are known, plain or as ``.gz``. Both have lengths only, so they are for the virtual clock.

    JSON lines   ``timestamp`` (ms), ``input_length``, ``output_length``, ``hash_ids``: Mooncake's
    CSV          ``TIMESTAMP`` or ``timestamp_ms``, ``ContextTokens`` or ``input_tokens``, ``GeneratedTokens`` or
                 ``output_tokens``: Azure's
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from typing import Any

from orla_lg.errors import ConfigError
from orla_lg_sim.blocks import Hash
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.replay import CallOutcome, outcome_of
from orla_lg_sim.request import Event, Kind, SimRequest

_TRACE_BLOCK_TOKENS = 512
"""What one of ``hash_ids`` stands for."""


@dataclass(frozen=True, slots=True)
class Arrival:
    """A request and when it comes."""

    at_s: float
    """Since the first one."""
    request: SimRequest


@dataclass(frozen=True, slots=True)
class Arrivals:
    """What a trace holds, as far as the engine can run it."""

    arrivals: tuple[Arrival, ...]
    too_long: int
    """Requests left out because no engine with these parameters could run them."""


def read(path: Path, parameters: EngineParameters, limit: int | None = None) -> Arrivals:
    """Return the first *limit* requests of a trace.

    Raises:
        ConfigError: The file is of neither form.
    """
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8-sig")
        rows = _csv_rows(text) if ".csv" in path.suffixes else _json_rows(text)
        found = sorted(islice(rows, limit), key=lambda row: row[0])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"arrivals cannot be read from {path}: {error!r}") from error
    if not found:
        raise ConfigError(f"{path} holds no arrivals")
    fitting = [row for row in found if row[1] + row[2] <= parameters.longest_tokens]
    made = [
        Arrival(at_s - found[0][0], SimRequest(str(number), prompt, output, _hashes(ids, prompt, parameters)))
        for number, (at_s, prompt, output, ids) in enumerate(fitting)
    ]
    return Arrivals(tuple(made), len(found) - len(fitting))


def run(arrivals: Iterable[Arrival], engine: SimEngine) -> list[CallOutcome]:
    """Return what each request saw; *arrivals* are in order."""
    sent: dict[str, float] = {}
    first: dict[str, float] = {}
    outcomes: list[CallOutcome] = []

    def heed(events: Sequence[Event]) -> None:
        for event in events:
            if event.kind is Kind.FIRST_TOKEN:
                first[event.id] = event.at_s
            elif event.kind is Kind.FINISHED:
                outcomes.append(outcome_of(event.id, 0, sent.pop(event.id), first.pop(event.id), event))

    for arrival in arrivals:
        heed(engine.advance(arrival.at_s))
        sent[arrival.request.id] = arrival.at_s
        engine.submit(arrival.request, arrival.at_s)
    while (at_s := engine.next_event_s()) is not None:
        heed(engine.advance(at_s))
    return outcomes


_Row = tuple[float, int, int, Sequence[int]]


def _json_rows(text: str) -> Iterator[_Row]:
    for line in text.splitlines():
        if line.strip():
            row = json.loads(line)
            ids = row.get("hash_ids") or ()
            yield row["timestamp"] / 1000, max(1, row["input_length"]), max(1, row["output_length"]), ids


def _csv_rows(text: str) -> Iterator[_Row]:
    for row in csv.DictReader(text.splitlines()):
        prompt = int(_either(row, "ContextTokens", "input_tokens"))
        output = int(_either(row, "GeneratedTokens", "output_tokens"))
        yield _seconds(row), max(1, prompt), max(1, output), ()


def _either(row: Mapping[str, Any], *names: str) -> Any:
    return row[next((name for name in names if name in row), names[0])]


def _seconds(row: Mapping[str, str]) -> float:
    if "timestamp_ms" in row:
        return float(row["timestamp_ms"]) / 1000
    whole, _, fraction = row["TIMESTAMP"].partition(".")  # seven digits, more than Python reads
    return datetime.fromisoformat(whole).replace(tzinfo=UTC).timestamp() + float(f"0.{fraction or 0}")


def _hashes(ids: Sequence[int], prompt_tokens: int, parameters: EngineParameters) -> list[Hash]:
    """Return the hashes of the prompt's full blocks: an engine's block is known by the trace's block it ends in."""
    size = parameters.block_tokens
    owners = ((block, ((block + 1) * size - 1) // _TRACE_BLOCK_TOKENS) for block in range(prompt_tokens // size))
    return [hash((ids[owner], block)) for block, owner in owners if owner < len(ids)]
