"""The sessions: every text, of a trace or made up, is cut to a number of tokens, so that a pool of a given size is
short by the same factor for each seed.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean
from typing import Any, Protocol

from bench.lib.calls import common
from bench.lib.engines import Message, cuts
from bench.lib.workflows import Session
from orla_lg_sim.text import Tokenizer, prose

CALLS = 5
PREFIX_TOKENS, HISTORY_TOKENS, ANSWER_TOKENS = 760, 2100, 24
"""The shared prefix; a session's last prompt and answer together, on the mean; every answer."""

SPREAD = 0.15
"""How much the sessions' own lengths differ: by this part at most, up or down."""

ARRIVE_EVERY_S = 0.25
WAIT_LEAST_S, WAIT_MOST_S = 0.2, 4.0
TOOL_MEDIAN_S, TOOL_P90_S = 0.1, 10.0
"""How long the tools between two calls of real agents take, where no file says so (TraceLab, 357,161 rounds)."""


class Words(Protocol):
    """The engine's idea of tokens."""

    def prompt(self, messages: Sequence[Message]) -> list[int]: ...
    def split(self, text: str, sizes: Sequence[int]) -> list[str] | None: ...


class LocalWords:
    """Tokens counted here: of a model's folder, or about those of any model."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self.tokenizer.prompt(messages)

    def split(self, text: str, sizes: Sequence[int]) -> list[str] | None:
        pieces = self.tokenizer.pieces(text)
        return ["".join(pieces[a:b]) for a, b in cuts(sizes)] if sum(sizes) <= len(pieces) else None


@dataclass(frozen=True)
class Material:
    """Texts to cut sessions from: one policy with its tools, and for each session what its user and tools said."""

    system: Sequence[str] = field(repr=False)
    """The policy, the tools."""
    sessions: Sequence[tuple[str, Sequence[float]]] = field(repr=False)
    """The text, and how it is shared out among the calls."""


@dataclass(frozen=True)
class Load:
    """What every arm of a seed is given."""

    seed: int
    system: str = field(repr=False)
    sessions: tuple[Session, ...]
    shared_tokens: int
    """With which the first prompts of all sessions begin."""
    answer_tokens: int

    def opening(self, session: Session) -> list[Message]:
        """Return the first prompt of a session."""
        return [{"role": "system", "content": self.system}, {"role": "user", "content": session.said[0]}]


@dataclass(frozen=True)
class Shape:
    """How much of it."""

    sessions: int = 12
    prefix_tokens: int = PREFIX_TOKENS
    history_tokens: int = HISTORY_TOKENS
    answer_tokens: int = ANSWER_TOKENS
    tool_s: tuple[float, float] = (TOOL_MEDIAN_S, TOOL_P90_S)
    """Median and 90th percentile of a log-normal."""


def load_of(material: Material, shape: Shape, words: Words, seed: int) -> Load:
    """Return the load of a seed: which sessions, how long each, how long their tools take."""
    dice = Random(seed)
    system = _system(material.system, shape.prefix_tokens, words)
    around = len(words.prompt(_frame(system)))
    texts, made = [*material.sessions], list[Session]()
    dice.shuffle(texts)
    lengths = [1 + SPREAD * (2 * n / max(1, shape.sessions - 1) - 1) for n in range(shape.sessions)]
    dice.shuffle(lengths)  # the same sum for every seed
    for text, weights in texts:
        if len(made) == shape.sessions:
            break
        own = round((shape.history_tokens - around) * lengths[len(made)])
        said = words.split(text, _shares(own - CALLS * shape.answer_tokens, weights))
        if said is not None:
            waits_s = tuple(wait_s(shape.tool_s, dice) for _ in range(CALLS - 1))
            made.append(Session(len(made) * ARRIVE_EVERY_S, tuple(said), waits_s))
    if len(made) < shape.sessions:
        found = f"the sessions file has {len(made)} sessions that are long enough"
        raise SystemExit(f"{found}; {shape.sessions} are needed")
    load = Load(seed, system, tuple(made), 0, shape.answer_tokens)
    return replace(load, shared_tokens=common([words.prompt(load.opening(session)) for session in made]))


def _system(texts: Sequence[str], tokens: int, words: Words) -> str:
    each = tokens // len(texts)
    pieces = [words.split(text, [each]) for text in texts]
    if any(piece is None for piece in pieces):
        raise SystemExit(f"the policy and the tools must have {each} tokens each at least")
    return "\n\n".join(piece[0] for piece in pieces if piece is not None)


def _frame(system: str) -> list[Message]:
    """Return a session's last prompt without its own words."""
    spoken = [{"role": role, "content": ""} for _ in range(CALLS) for role in ("user", "assistant")]
    return [{"role": "system", "content": system}, *spoken[:-1]]


def _shares(tokens: int, weights: Sequence[float]) -> list[int]:
    """Share tokens out by weight, none far from the mean: a call without anything new would be no call."""
    mean = fmean(weights)
    clipped = [min(2 * mean, max(mean / 2, weight)) for weight in weights]
    return [round(tokens * weight / sum(clipped)) for weight in clipped]


def wait_s(tool_s: tuple[float, float], dice: Random) -> float:
    """Draw how long a tool takes, from a log-normal with this median and 90th percentile, clipped."""
    median_s, p90_s = tool_s
    sigma = math.log(p90_s / median_s) / NormalDist().inv_cdf(0.9)
    return min(WAIT_MOST_S, max(WAIT_LEAST_S, dice.lognormvariate(math.log(median_s), sigma)))


def made_up(sessions: int, tokens: int) -> Material:
    """Return texts of short words, as many tokens as are asked for and more."""
    dice = Random(0)
    texts = ["".join(prose(dice, 2 * tokens)) for _ in range(sessions + 2)]
    shared = [[dice.lognormvariate(0, 0.5) for _ in range(CALLS)] for _ in texts]
    return Material(texts[:2], list(zip(texts[2:], shared[2:], strict=True)))


def from_trace(sessions: Path, prompts: Path) -> Material:
    """Read sessions (JSON lines: ``messages``, ``prompt_ref``, ``tools_ref``) and the texts they refer to."""
    try:
        data = sessions.read_bytes()
        lines = (gzip.decompress(data) if sessions.suffix == ".gz" else data).decode().splitlines()
        rows = [json.loads(line) for line in lines if line.strip()]
        texts = json.loads(prompts.read_text(encoding="utf-8"))
        refs = [row["prompt_ref"] for row in rows]
        ref = max(sorted({*refs}), key=refs.count)
        tools = next(row["tools_ref"] for row in rows if row["prompt_ref"] == ref)
        system = [str(texts["prompts"][ref]), json.dumps(texts["tools"][tools])]
        taken = [found for row in rows if row["prompt_ref"] == ref and (found := _said(row["messages"])) is not None]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise SystemExit(f"sessions cannot be read from {sessions} and {prompts}: {error!r}") from error
    return Material(system, taken)


def _said(messages: Iterable[Mapping[str, Any]]) -> tuple[str, list[float]] | None:
    """Return all that user and tools say, and how long it is before each of the first calls; too short: ``None``."""
    texts, sizes, size = list[str](), list[float](), 0.0
    for message in messages:
        if message["role"] != "assistant":
            texts.append(message.get("content") or "")
            size += len(texts[-1])
        elif size:
            sizes.append(size)
            size = 0.0
    return ("\n".join(texts), sizes[:CALLS]) if len(sizes) >= CALLS else None


def tool_times(path: Path) -> tuple[float, float]:
    """Read median and 90th percentile of ``per_step_s.tool_execution``."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))["per_step_s"]["tool_execution"]
        return float(said["p50"]), float(said["p90"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"tool times cannot be read from {path}: {error!r}") from error
