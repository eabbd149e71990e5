"""Whether an engine says the same in one piece and as a stream: found out once, by one pair of answers.

Equal are two answers with the same content, tool calls, reason to end, token counts and whatever else is not null.
Ids, times, counts of what was cached and the spaces between what ``arguments`` are made of may differ, a content of
nothing may be null or an empty text, and no tool calls null or an empty list. Equal answers without a tool call say
nothing of tool calls, whose parser is what may be at fault, so they count as if they differed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

from orla_lg.core.boundary.plain import counted
from orla_lg.core.engine.backend import Backend, Probe
from orla_lg.errors import shown

log = logging.getLogger("orla_lg")

MOST_TRIES = 3
"""A pair that got no answer is tried again, so often at most."""
AGAIN_S = 60.0
MOST_SHOWN = 3
"""Differences that a message names."""

_PASSING = frozenset({"id", "created", "created_at", "timings", "metrics", "request_id", "x_groq"})
"""Keys whose values differ from request to request."""
_TIMES = ("_time", "_ms", "_per_second", "_duration")


def engine_of(probe: Probe | None) -> Hashable:
    """Return what differs where the engine became another one."""
    return None if probe is None else (probe.incarnation, probe.version, probe.models)


def differences(plain: Any, streamed: Any, where: str = "") -> Iterator[str]:
    """Yield how an answer that was streamed and put together differs from one that came in one piece."""
    if isinstance(plain, Mapping) and isinstance(streamed, Mapping):
        for key in dict.fromkeys([*plain, *streamed]):
            if not _passes(key):
                inner = f"{where}.{key}" if where else str(key)
                yield from differences(_bare(plain.get(key)), _bare(streamed.get(key)), inner)
    elif isinstance(plain, list) and isinstance(streamed, list) and len(plain) == len(streamed):
        for at, (one, other) in enumerate(zip(plain, streamed, strict=True)):
            yield from differences(one, other, f"{where}[{at}]")
    elif where.endswith(".arguments") and isinstance(plain, str) and isinstance(streamed, str):
        if _parsed(plain) != _parsed(streamed):
            yield f"{where} is {shown(plain)} in one piece, {shown(streamed)} streamed"
    elif where.endswith((".content", ".tool_calls")) and not plain and not streamed:
        return  # null, or an empty text or list
    elif plain != streamed or type(plain) is not type(streamed):
        yield f"{where} is {shown(plain)} in one piece, {shown(streamed)} streamed"


def _choices(answer: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    choices = answer.get("choices")
    return (each for each in choices if isinstance(each, Mapping)) if isinstance(choices, list) else iter(())


def has_calls(answer: Mapping[str, Any]) -> bool:
    """Whether a tool is called in an answer that came in one piece."""
    messages = (each.get("message") for each in _choices(answer))
    return any(isinstance(each, Mapping) and each.get("tool_calls") for each in messages)


def is_cut(answer: Mapping[str, Any]) -> bool:
    """Whether an answer that came in one piece was longer than allowed."""
    return any(each.get("finish_reason") == "length" for each in _choices(answer))


def _bare(value: Any) -> Any:
    """Return a value, ``None`` for an object with nothing in it but what may differ."""
    if isinstance(value, Mapping):
        return value if any(not _passes(key) and _bare(held) is not None for key, held in value.items()) else None
    return value


def _passes(key: str) -> bool:
    """Whether what stands under *key* differs from request to request."""
    return key in _PASSING or key.endswith(_TIMES) or ("cache" in key and key.endswith("_tokens"))


def _parsed(arguments: str) -> Any:
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


class Agreement:
    """What is known of one backend's engine; forgotten when the engine becomes another one. Any thread may call.

    Args:
        backend: The engine.
    """

    def __init__(self, backend: Backend) -> None:
        self.found: Sequence[str] | None = None
        """How the pair differs; empty for equal answers, ``None`` before there is a pair."""
        self.had_calls = False
        """Whether a tool call was in it."""
        self._backend = backend
        self._lock = threading.Lock()
        self._engine: Hashable = None
        self._tries, self._again_s, self._under_way = 0, 0.0, False

    def holds(self, engine: Hashable) -> bool | None:
        """Whether both are equal on *engine* (``engine_of``), tool calls too; ``None`` before there is a pair."""
        return None if self.found is None or not self._is(engine) else not self.found and self.had_calls

    def begins(self, engine: Hashable) -> bool:
        """Whether a pair is to be asked for now; one caller at a time is told so."""
        with self._lock:
            if not self._is(engine):
                self.found = None
                self._tries, self._again_s, self._under_way = 0, 0.0, False
            self._engine = self._engine if engine is None else engine
            waits = self._under_way or self._tries >= MOST_TRIES or time.monotonic() < self._again_s
            if self.found is not None or waits:
                return False
            self._tries, self._under_way = self._tries + 1, True
            return True

    def learn(self, engine: Hashable, plain: Mapping[str, Any], streamed: Mapping[str, Any]) -> None:
        """Take note of a pair of answers."""
        self.conclude(engine, list(differences(plain, streamed)), had_calls=has_calls(plain))

    def conclude(self, engine: Hashable, found: Sequence[str], *, had_calls: bool = False) -> None:
        """Take note of how they differ, and say so once."""
        with self._lock:
            if not self._is(engine) or self.found is not None:
                return
            self.found, self.had_calls, self._under_way = tuple(found[:MOST_SHOWN]), had_calls, False
        self._say(len(found))

    def fails(self, engine: Hashable, error: BaseException) -> None:
        """Note that a pair got no answer."""
        with self._lock:
            if self._is(engine):
                self._under_way, self._again_s = False, time.monotonic() + AGAIN_S
        log.debug("backend %r: no pair of answers to compare: %s", self._backend.name, error)

    def __str__(self) -> str:
        if self.found is None:
            return "whether its answers are the same when they are streamed is not known yet"
        if not self.found and not self.had_calls:
            return "whether its tool calls are the same when they are streamed is not known: its model called no tool"
        if not self.found:
            return "its answers are the same when they are streamed"
        return f"its answers differ when they are streamed: {'; '.join(self.found)}"

    def _is(self, engine: Hashable) -> bool:
        """Whether *engine* is the one that is known, as far as that shows: before its first probe none can differ."""
        return engine is None or self._engine is None or engine == self._engine

    def _say(self, differing: int) -> None:
        backend = self._backend
        if differing or not self.had_calls:
            more = f" and in {counted(differing - MOST_SHOWN, 'other way')}" if differing > MOST_SHOWN else ""
            log.warning(
                "backend %r at %s: %s%s. What is asked for in one piece is not streamed there, so tools start when "
                "it ends; Backend(assemble=True) streams it all the same",
                backend.name, backend.url, self, more,
            )  # fmt: skip
        else:
            log.info(
                "backend %r at %s: %s. What is asked for in one piece is streamed there where a tool may start early",
                backend.name, backend.url, self,
            )  # fmt: skip
