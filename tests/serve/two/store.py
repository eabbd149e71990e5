"""The store as one core reaches it: questions and answers are lost, or late."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

from orla_lg.serve.store.store import Fence, MemoryStore, StoreUnavailable

T = TypeVar("T")


class Fault(NamedTuple):
    """What befalls one question to the store."""

    before: bool
    """Whether it takes no effect; else it does, and only its answer is lost or late."""
    seconds: float = 0.0
    """For so long the core stands still in it; 0: it fails."""


class FlakyStore:
    """The store as one core reaches it (``store.Store``)."""

    def __init__(self, inner: MemoryStore, stand_still: Callable[[float], None], *, heeds_fences: bool) -> None:
        self._inner, self._stand_still, self._heeds_fences = inner, stand_still, heeds_fences
        self.away_until_s = 0.0
        self.deaf = set[str]()
        """Methods that never answer."""
        self.faults = deque[Fault]()

    def _ask(self, what: str, asked: Callable[[], T]) -> T:
        fault = self.faults.popleft() if self.faults else None
        if fault is not None and fault.before:
            self._suffer(fault)
        if self._inner._now().since_boot_s < self.away_until_s or what in self.deaf:
            raise StoreUnavailable("it does not answer")
        answer = asked()
        if fault is not None and not fault.before:
            self._suffer(fault)
        return answer

    def _suffer(self, fault: Fault) -> None:
        if not fault.seconds:
            raise StoreUnavailable("the question was lost" if fault.before else "the answer was lost")
        self._stand_still(fault.seconds)

    def get(self, key: str) -> Any:
        return self._ask("get", lambda: self._inner.get(key))

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> Any:
        fence = fence if self._heeds_fences else None
        return self._ask("put", lambda: self._inner.put(key, value, expected=expected, fence=fence))

    def scan(self, prefix: str) -> Any:
        return self._ask("scan", lambda: self._inner.scan(prefix))

    def lease(self, name: str, holder: str, ttl_s: float) -> Any:
        return self._ask("lease", lambda: self._inner.lease(name, holder, ttl_s))

    def watch(self, prefix: str, changed: Callable[[], None]) -> Callable[[], None]:
        return self._inner.watch(prefix, changed)
