"""What runs on a cluster, as it was last seen: asked of the actors themselves, and said where it has changed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from orla_lg.serve.ray.hosted import STARTING

POLL_S = 1.0
MOST_FAULT = 300
AWAY = "away"
"""The state of an actor that does not answer: its process ended, or its node."""

READY, STANDBY = "ready", "standby"
"""States of a server that listens (``http.health.CoreState``)."""


class ActorSeen(NamedTuple):
    """An actor, as it last answered."""

    state: str = STARTING
    pool: str = ""
    url: str = ""
    epoch: int = 0
    pid: int = 0
    fault: str = ""
    fingerprint: str = ""
    node_id: str = ""

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> ActorSeen:
        """Read an answer; what another version says beside that is left."""
        return cls(**{name: value for name, value in said.items() if name in cls._fields})

    def text(self, name: str) -> str:
        """Return one line."""
        parts = [f"{name:<20}", f"{self.state:<8}"]
        parts += [f"epoch {self.epoch}"] if self.epoch else []
        parts += [f"pid {self.pid}"] if self.pid else []
        parts += [f"node {self.node_id[:8]}"] if self.node_id else []
        return "  ".join([*parts, *filter(None, (self.url, self.fault))])


class ActorWatch:
    """The actors of one command.

    Args:
        ray: The package.
        handles: By name, the actors to follow.
    """

    def __init__(self, ray: Any, handles: Mapping[str, Any]) -> None:
        self._ray = ray
        self.handles: dict[str, Any] = {}
        self.seen: dict[str, ActorSeen] = {}
        self._asked: dict[str, Any] = {}
        """Questions without an answer yet: one for each actor at most."""
        for name, handle in handles.items():
            self.follow(name, handle)

    def follow(self, name: str, handle: Any) -> None:
        """Follow one more."""
        self.handles[name], self.seen[name] = handle, ActorSeen()

    def look(self, within_s: float = POLL_S) -> Iterator[str]:
        """Ask all of them, and yield the names of those that changed."""
        for name, handle in self.handles.items():
            if name not in self._asked:
                self._asked[name] = handle.status.remote()
        asked = {question: name for name, question in self._asked.items()}
        answered, _ = self._ray.wait(list(asked), num_returns=len(asked), timeout=within_s)
        for question in answered:
            name = asked[question]
            del self._asked[name]
            now = self._answer(name, question)
            before, self.seen[name] = self.seen[name], now
            if now != before:
                yield name

    def _answer(self, name: str, question: Any) -> ActorSeen:
        try:
            return ActorSeen.of(self._ray.get(question))
        except self._ray.exceptions.ActorUnavailableError:
            return self.seen[name]._replace(state=AWAY, epoch=0)
        except self._ray.exceptions.RayError as error:  # it cannot be made there, or was killed for good
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            return self.seen[name]._replace(state=AWAY, epoch=0, fault=lines[-1][:MOST_FAULT] if lines else "")

    def urls(self, names: Iterable[str]) -> str:
        """Return where servers are reached, as ``Orla.remote`` takes it: a core before its standbys."""
        found = [seen for name in names if (seen := self.seen[name]).url]
        return ",".join(seen.url for seen in sorted(found, key=lambda each: -each.epoch))
