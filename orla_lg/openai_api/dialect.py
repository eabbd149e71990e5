"""What one backend's engine turned out not to take: learned from its answers, kept as long as the process."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Mapping
from typing import Any

from orla_lg.core.engine.backend import Backend

log = logging.getLogger("orla_lg")

STREAM_OPTIONS = "stream_options"
REFUSALS = frozenset({400, 422})
"""How a server says that it does not take a field."""


def is_guard(name: str, value: Any) -> bool:
    """Whether a field of ours keeps workflows or tenants apart: it is never left out to please a server."""
    return name == "cache_salt" or (name == "cache_prompt" and value is False)


def parted(fields: Mapping[str, Any], asked: Mapping[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """Return which of our *fields* are guards, and the names of the others that the request did not have so."""
    guards, added = dict[str, Any](), set[str]()
    for name, value in fields.items():
        if is_guard(name, value):
            guards[name] = value
        elif asked.get(name, fields) != value:
            added.add(name)
    return guards, added


def named_in(answer: str, fields: Collection[str]) -> set[str]:
    """Return which of *fields* an engine's answer names."""
    return {name for name in fields if re.search(rf"\b{re.escape(name)}\b", answer)}


def may_refuse(fields: Collection[str], status: int, answer: str) -> bool:
    """Whether an engine that answered an error may mean *fields*: it says so, or crashed over one and names it."""
    return bool(fields) and (status in REFUSALS or (status >= 500 and bool(named_in(answer, fields))))


class Dialect:
    """Fields that an engine refuses, and whether its streams end with token counts.

    Args:
        backend: The engine.
    """

    def __init__(self, backend: Backend) -> None:
        self.refused: frozenset[str] = frozenset()
        """Fields of ours that are not sent any more."""
        self._backend = backend
        self._lock = threading.Lock()
        self._counted: bool | None = None
        """Whether an assembled answer brings the token counts that a whole one has; ``None`` before the first."""

    def without_refused(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return *fields* without what the engine refuses."""
        return {name: value for name, value in fields.items() if name not in self.refused or is_guard(name, value)}

    def learn(self, added: Collection[str], answer: str, status: int = 400) -> None:
        """Note that a request was refused with the fields *added* by us, and taken without them.

        Args:
            added: What we had added.
            answer: What the engine said: where it names one of them, the others are not meant.
            status: With which status. A crash may name a field by chance, where the name is an everyday word.
        """
        named = named_in(answer, added)
        if status not in REFUSALS:
            added = named = {name for name in named if "_" in name}
        with self._lock:
            new = (named or set(added)) - self.refused
            self.refused |= new
        if new:
            cost = "; its streams bring no token counts" if STREAM_OPTIONS in new else ""
            log.warning(
                "backend %r at %s refuses %s, which orla_lg adds to requests; they go without from now on%s",
                self._backend.name, self._backend.url, ", ".join(sorted(new)), cost,
            )  # fmt: skip

    @property
    def assembles(self) -> bool:
        """Whether nothing is lost by streaming an answer from the engine that is to be whole."""
        return self._counted is not False and not self.refused & {"stream", STREAM_OPTIONS}

    def answered(self, *, assembled: bool, counted: bool) -> None:
        """Note whether an answer brought token counts; where only whole ones do, none is assembled any more."""
        if assembled and (counted or self._counted is None):
            self._counted = counted
        elif not (assembled or counted) and self._counted is False:
            self._counted = True  # it counts nothing anywhere
