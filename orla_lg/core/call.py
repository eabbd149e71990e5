"""What flows through the core: one model call, what it asks for, and what was decided and seen."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from hashlib import blake2b
from math import isfinite
from typing import Any, Literal

from orla_lg.arguments import answering
from orla_lg.core.guard.access import CallAccess
from orla_lg.core.identity import Identity
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.errors import ConfigError, did_you_mean

CHARS_PER_TOKEN = 4
"""A usual figure, for estimates where the engine did not count."""

ANSWER_TOKENS = 256.0
"""How long an answer is expected of a stage that has not answered yet."""

HASH_BYTES = 8
"""Length of the hash of a prompt's beginning, in bytes."""

KEEP_HASHES = 16_384

_CHAINED: dict[int, int] = {}
"""Of messages seen lately: by this process's own hash of a message and of what comes before it, the hash that all
processes share. It takes ten times as long, and an agent's prompt begins as its last one did."""

OBJECT = (dict, Mapping)
"""What an object of a request may be. Nearly always a ``dict``, which is found ten times as fast as a ``Mapping``."""

CacheHint = Literal["preserve", "flush", "auto"]


@answering
@dataclass(frozen=True, slots=True)
class Hints:
    """What a user may say about a call; ``None`` says nothing. A value that is not allowed is a ``ConfigError``."""

    priority: float | None = None
    """Higher is more urgent, on every engine; 0 where nothing is said."""
    cache: CacheHint | None = None
    """``flush`` frees this workflow's cache after the call; ``preserve`` pins it whatever the call found cached, and
    keeps what lies on the backend that the workflow leaves with it; ``auto`` leaves it to ``Orla.memory``."""
    deadline_s: float | None = None
    """Seconds from the call's arrival within which it must have left the queue."""
    tenant: str | None = None
    """Whose call it is: its workflow, limits and shares are that tenant's. ``None``: the run's; empty: no one's."""
    variant: str | None = None
    """The named set of overrides of the mapping that this run uses."""

    def __post_init__(self) -> None:
        if self.priority is not None and not (_is_number(self.priority) and isfinite(self.priority)):
            raise ConfigError(f"priority must be a number, got {self.priority!r}")
        if self.cache not in (None, "preserve", "flush", "auto"):
            raise ConfigError(f"cache hint {self.cache!r} is not one of 'preserve', 'flush', 'auto'")
        if self.variant is not None and not (isinstance(self.variant, str) and self.variant):
            raise ConfigError(f"variant must be a name, got {self.variant!r}")
        if self.tenant is not None and not isinstance(self.tenant, str):
            raise ConfigError(f"tenant must be a name, got {self.tenant!r}")
        if self.deadline_s is not None and not (_is_number(self.deadline_s) and self.deadline_s > 0):
            raise ConfigError(f"deadline_s must be positive, in seconds, got {self.deadline_s!r}")

    def over(self, weaker: Hints) -> Hints:
        """Return these hints with the gaps filled from *weaker*."""
        if self is NO_HINTS:
            return weaker
        if weaker is NO_HINTS:
            return self
        merged = {f.name: getattr(weaker if getattr(self, f.name) is None else self, f.name) for f in fields(Hints)}
        return Hints(**merged)

    @classmethod
    def of(cls, said: Hints | Mapping[str, Any], *, beside: Collection[str] = ()) -> Hints:
        """Return the hints that somebody said, as such or as a mapping from their names to values.

        Args:
            said: What was said.
            beside: Names that may stand beside them and mean something else; they are passed over.

        Raises:
            ConfigError: It is neither, a name is not a hint, or a value is not allowed.
        """
        if isinstance(said, cls):
            return said
        if not isinstance(said, Mapping):
            raise ConfigError(f"expected Hints, or a dict of them, got {type(said).__name__}")
        known = {*(each.name for each in fields(cls)), *beside}
        for name in said:
            if name not in known:
                raise ConfigError(f"unknown hint {name!r}{did_you_mean(str(name), known)}")
        return cls(**{name: value for name, value in said.items() if name not in beside})


def _is_number(said: object) -> bool:
    return isinstance(said, int | float) and not isinstance(said, bool)


NO_HINTS = Hints()


@dataclass(frozen=True)
class Ask:
    """What the request says that decisions need; the body itself stays at the edge."""

    model: str
    """As the code names it: a backend's name, a model, or ``auto``."""
    messages: Sequence[Any] = field(repr=False)
    """OpenAI-shaped messages; read for their length and for prefix hashes, never kept or logged."""
    stream: bool = False
    """The caller reads tokens as they come."""
    json_schema: bool = False
    """The answer must follow a schema."""
    tools: bool = False
    """The model may call tools."""
    schemas: Sequence[Any] = field(default=(), repr=False)
    """The tools as the request describes them; read for their length."""
    max_tokens: int | None = None
    """The caller's bound on the answer, in tokens."""
    embeds: bool = False
    """The answer is vectors: no KV cache holds anything of it, and only a mapping that names it places it."""
    scope: str = field(default="", repr=False)
    """In whose part of a cache its prefix is found, where that is divided (``isolation``); empty: in that of all."""

    def within(self, scope: str) -> Ask:
        """Return the same request with the prefixes of another scope."""
        return self if scope == self.scope else replace(self, scope=scope)

    def given(self, parameters: Mapping[str, Any]) -> Ask:
        """Return what is asked for once a mapping's *parameters* are added."""
        form = parameters.get("response_format")
        schema = isinstance(form, Mapping) and form.get("type") == "json_schema"
        bound = parameters.get("max_tokens", parameters.get("max_completion_tokens"))
        limit = self.max_tokens if self.max_tokens is not None else bound
        if (schema or self.json_schema, limit) == (self.json_schema, self.max_tokens):
            return self
        return replace(self, json_schema=schema or self.json_schema, max_tokens=limit)

    @cached_property
    def prompt_chars(self) -> int:
        """The length of the prompt's text in characters, an engine-free stand-in for tokens."""
        return sum(map(_chars, self.messages))

    @cached_property
    def tools_chars(self) -> int:
        """The length of the tools' schemas in characters, which the model reads with its prompt."""
        return len(json.dumps(self.schemas, default=str)) if self.schemas else 0

    @cached_property
    def images(self) -> bool:
        """Whether the prompt shows images."""
        return any(_shows_image(message) for message in self.messages)

    @cached_property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """For each message a chained hash (equal ones: equal prompts up to there) and its length in characters.

        The same prompt has the same hashes in every process.
        """
        made, chained = [], int(self.tools)
        for message in self.messages:
            text = _text(message)
            known = _CHAINED.get(place := hash((chained, text)))
            if known is None:
                if len(_CHAINED) >= KEEP_HASHES:
                    _CHAINED.clear()
                known = _CHAINED[place] = _chained(chained, text)
            made.append((known, len(text)))
            chained = known
        return scoped(made, self.scope)

    @cached_property
    def prefix(self) -> tuple[int, ...]:
        """The chained hashes alone."""
        return tuple(chained for chained, _ in self.pieces)

    def is_answer(self, index: int) -> bool:
        """Whether a message is what a model said."""
        message = self.messages[index]
        return isinstance(message, Mapping) and message.get("role") == "assistant"


def scoped(pieces: Sequence[tuple[int, int]], scope: str) -> tuple[tuple[int, int], ...]:
    """Return the pieces of a prompt as they are in a scope: its own hashes stay the same ones, elsewhere too."""
    return tuple((_chained(hashed, scope), chars) for hashed, chars in pieces) if scope else tuple(pieces)


def _chained(before: int, text: str) -> int:
    """Return the hash of a prompt's beginning: of what comes *before* in it, by its hash, and then *text*."""
    data = before.to_bytes(HASH_BYTES) + text.encode("utf-8", "surrogatepass")
    return int.from_bytes(blake2b(data, digest_size=HASH_BYTES).digest())


def _chars(message: Any) -> int:
    content = message.get("content") if isinstance(message, OBJECT) else None
    if isinstance(content, str):
        return len(content)
    parts = content if isinstance(content, list | tuple) else ()  # images and sound have tokens, but no characters
    return sum(len(part["text"]) for part in parts if isinstance(part, Mapping) and isinstance(part.get("text"), str))


def _shows_image(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    parts = content if isinstance(content, list | tuple) else ()
    return any(isinstance(part, Mapping) and part.get("type") == "image_url" for part in parts)


def _text(message: Any) -> str:
    if isinstance(message, OBJECT):
        content = message.get("content")
        if isinstance(content, str) and "tool_calls" not in message:
            return f"{message.get('role')}\n{content}"
    return repr(message)


def in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many leading messages two prompts share, both as chained message hashes."""
    shared = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        shared += 1
    return shared


@dataclass(frozen=True, slots=True)
class CallerTimeout:
    """How long the caller's own client waits for an answer, and what it raises then."""

    seconds: float
    """How long the client waits for each attempt, in seconds."""
    error: Callable[[str], Exception]
    """Makes the client's own error; given is what the call waited for."""


@dataclass(eq=False, slots=True)
class Call:
    """One model call on its way; the decisions about it are kept beside it, not in it."""

    id: str
    identity: Identity
    ask: Ask
    said: Hints
    """Given with the call itself; nothing overrides them."""
    hints: Hints
    """All hints, the strongest of each."""
    arrived_s: float
    """Monotonic seconds."""
    standing: RunShare = field(default_factory=RunShare)
    """Its run's place among others."""
    answer_tokens: float = ANSWER_TOKENS
    """How long an answer is expected of its stage."""
    mapped_max_tokens: int | None = None
    """Its mapping's bound on the answer; it counts where the caller gave none."""
    nth: int = 0
    """Which call of its stage in its run it is, from 1; 0 where that is not known."""
    final_odds: float | None = None
    """How likely no call of its run follows it, where a policy asked (``FinalFirst``)."""
    may_pass: bool = False
    """The call may go where its code says, past us (an intercepted model); else that is an error."""
    timeout: CallerTimeout | None = None
    """Of the client that the code called; ``None`` waits as long as it takes."""
    access: CallAccess | None = None
    """What access policies need to know beside; ``None``: it is a call of this ``Orla`` like any other."""

    @property
    def expected_tokens(self) -> float:
        """Prompt and answer together, as far as that can be told beforehand."""
        return self.ask.prompt_chars / CHARS_PER_TOKEN + self.expected_answer_tokens

    @property
    def expected_answer_tokens(self) -> float:
        """What the stage usually answers, within the caller's bound, else its mapping's."""
        bound = self.mapped_max_tokens if self.ask.max_tokens is None else self.ask.max_tokens
        return self.answer_tokens if bound is None else min(self.answer_tokens, bound)

    @property
    def priority(self) -> float:
        """The hinted priority, 0 where nothing was said."""
        return self.hints.priority or 0.0

    @property
    def deadline_at_s(self) -> float | None:
        """The monotonic time by which the call must leave the queue."""
        return None if self.hints.deadline_s is None else self.arrived_s + self.hints.deadline_s


@dataclass(frozen=True, slots=True)
class Considered:
    """A backend that a mapper weighed, with the numbers it saw."""

    backend: str
    numbers: Mapping[str, float] = field(default_factory=dict)
    """By name, with the unit in it: ``expected_s``, ``cost_usd``, ``quality``, ``waiting``."""
    verdict: str = ""
    """Why it was taken or not."""


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a call runs."""

    backend: str
    model: str | None = None
    """``None`` means the backend's own model."""
    mapper: str = "explicit"
    reason: str = ""
    alternatives: tuple[str, ...] = ()
    """Other backends that may take the call when this one cannot be reached, in order."""
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the request's body; each counts only where the caller said nothing of it."""
    considered: tuple[Considered, ...] = ()
    """What was weighed, for the record."""


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one call, as the engine counted them."""

    prompt_tokens: int = 0
    cached_tokens: int | None = None
    """Prompt tokens found in the KV cache; ``None`` where the engine does not say."""
    completion_tokens: int = 0
    prefill_s: float | None = None
    """What the engine took for the others, in seconds; ``None`` where it does not say."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """A piece of a raw stream from an engine (``BackendAdapter.generate``)."""

    text: str = ""
    usage: Usage | None = None
    finish_reason: str | None = None
