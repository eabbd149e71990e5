"""Workloads: multi-turn sessions read from a file the user gives, in a public trace's form."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from orla_lg.errors import ConfigError

_CHARS_PER_TOKEN = 4
_LEAST_ANSWER_TOKENS = 8
"""An answer of a word or two says little about an engine."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One call of a session."""

    messages: tuple[dict[str, str], ...] = field(repr=False)
    """All that the model sees."""
    output_tokens: int
    think_s: float
    """Between the end of the call before (or the session's begin) and this one."""


@dataclass(frozen=True, slots=True)
class Session:
    """One run of an agent or a chat: its calls, one after another."""

    id: str
    begin_s: float
    """After the begin of the replay."""
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Shape:
    """How sessions of a trace are replayed."""

    sessions: int = 8
    skip: int = 0
    """Sessions of the file to leave out first."""
    turns: int = 10
    """At most, of each session."""
    begin_every_s: float = 2.0
    """The mean of the times between the begins of sessions."""
    think_s: float = 1.0
    """The mean of the times between a call's end and the next one, where the trace has no times."""
    longest_chars: int = 12_000
    """A session's calls end before one with a longer prompt."""
    seed: int = 0


def read(path: Path, shape: Shape, prompts: Path | None = None) -> list[Session]:
    """Return sessions from JSON lines: ``session_id``, ``messages`` in OpenAI's form, and perhaps ``prompt_ref``.

    Args:
        path: The file; ``.gz`` is unpacked.
        shape: How many of them, and when.
        prompts: A JSON object whose ``prompts`` hold the system messages that ``prompt_ref`` names; by default
            ``prompts_and_tools.json`` beside *path*.

    Raises:
        ConfigError: The file is not of that form.
    """
    known = _system_prompts(prompts or path.with_name("prompts_and_tools.json"))
    random, begin_s, skip = Random(shape.seed), 0.0, shape.skip
    made: list[Session] = []
    for number, row in enumerate(_rows(path)):
        if len(made) == shape.sessions:
            break
        try:
            turns = tuple(_turns(row, known.get(str(row.get("prompt_ref"))), shape, random))
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path}, line {number + 1}: not a session with messages ({error!r})") from error
        if len(turns) < 2:
            continue
        if skip:
            skip -= 1
        else:
            made.append(Session(str(row.get("session_id", number)), begin_s, turns))
            begin_s += random.expovariate(1 / shape.begin_every_s) if shape.begin_every_s else 0.0
    if not made:
        raise ConfigError(f"{path} has no session of two calls or more within {shape.longest_chars} characters")
    return made


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
        rows = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"sessions cannot be read from {path}: {error}") from error
    return rows


def _system_prompts(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    try:
        said = json.loads(path.read_text(encoding="utf-8")).get("prompts") or {}
    except (OSError, json.JSONDecodeError, AttributeError) as error:
        raise ConfigError(f"system prompts cannot be read from {path}: {error}") from error
    return {str(name): text if isinstance(text, str) else json.dumps(text) for name, text in said.items()}


def _turns(row: Mapping[str, Any], system: str | None, shape: Shape, random: Random) -> Iterator[Turn]:
    seen = [{"role": "system", "content": system}] if system else []
    chars, count = sum(len(message["content"]) for message in seen), 0
    for message in row["messages"]:
        plain = _plain(message)
        if (
            message["role"] == "assistant"
            and not message.get("canned")
            and any(one["role"] == "user" for one in seen)
        ):
            if chars > shape.longest_chars or count == shape.turns:
                return
            count += 1
            tokens = max(_LEAST_ANSWER_TOKENS, len(plain["content"]) // _CHARS_PER_TOKEN)
            yield Turn(tuple(seen), tokens, random.expovariate(1 / shape.think_s) if shape.think_s else 0.0)
        seen.append(plain)
        chars += len(plain["content"])


def _plain(message: Mapping[str, Any]) -> dict[str, str]:
    """Return a message in words only, so that every chat template takes it and counts the same."""
    text = message.get("content") or ""
    calls: Iterable[Mapping[str, Any]] = message.get("tool_calls") or ()
    called = [f"{call['function']['name']}({call['function']['arguments']})" for call in calls]
    role = "user" if message["role"] == "tool" else message["role"]
    return {"role": str(role), "content": "\n".join([text, *called] if text else called)}
