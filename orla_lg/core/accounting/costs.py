"""What calls cost, summed per stage, run, tenant and backend.

A record is summed up with the next ones, some dozens at once or when a figure is asked for: that costs a call less.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.record import Record

KEEP_RUNS = 1_000
"""The sums of so many runs are kept, the newest."""

KEEP_OTHERS = 10_000
"""Of stages, and of tenants, which may be as many as there are users."""

BATCH = 64
"""So many records are summed up at once."""


@dataclass(frozen=True, slots=True)
class Spent:
    """A sum over calls."""

    usd: float = 0.0
    """US dollars, by the backends' prices; calls without token counts add nothing."""
    calls: int = 0
    prompt_tokens: int = 0
    """The cached ones included."""
    cached_tokens: int = 0
    completion_tokens: int = 0


_NOTHING = (0.0, 0, 0, 0, 0)
"""The fields of ``Spent`` before the first call."""

_Sum = tuple[float, int, int, int, int]


@dataclass(frozen=True, slots=True)
class Costs:
    """What was spent since the start."""

    total: Spent
    stages: dict[str, Spent]
    """``""`` are calls outside any graph."""
    runs: dict[str, Spent]
    """The newest runs only; calls of no run are in none."""
    tenants: dict[str, Spent]
    """As hinted; calls of no tenant are in none."""
    backends: dict[str, Spent]


class CostBook:
    """Sums what records say, each once, of calls that were placed on a backend."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._new: deque[Record] = deque()
        """Not summed up yet; added to without the lock."""
        self._total: _Sum = _NOTHING
        self._stages = BoundedDict[str, _Sum](KEEP_OTHERS)
        self._runs = BoundedDict[str, _Sum](KEEP_RUNS)
        self._tenants = BoundedDict[str, _Sum](KEEP_OTHERS)
        self._backends = BoundedDict[str, _Sum](KEEP_OTHERS)

    def add(self, record: Record) -> None:
        """Count one call; calls that were not ours, or were never placed, cost nothing here."""
        if record.external or record.backend is None:
            return
        self._new.append(record)
        if len(self._new) >= BATCH:
            with self._lock:
                self._catch_up()

    def _catch_up(self) -> None:
        while self._new:
            self._sum_up(self._new.popleft())

    def _sum_up(self, record: Record) -> None:
        more_usd = record.cost_usd or 0.0
        more_prompt, more_cached = record.prompt_tokens or 0, record.cached_tokens or 0
        more_answer = record.completion_tokens or 0
        usd, calls, prompt, cached, answer = self._total
        self._total = usd + more_usd, calls + 1, prompt + more_prompt, cached + more_cached, answer + more_answer
        for sums, key in (
            (self._stages, record.stage),
            (self._runs, record.run),
            (self._tenants, record.tenant),
            (self._backends, record.backend),
        ):
            if key is not None:
                usd, calls, prompt, cached, answer = sums.get(key) or _NOTHING
                sums.set(
                    key,
                    (usd + more_usd, calls + 1, prompt + more_prompt, cached + more_cached, answer + more_answer),
                )

    def statistics(self) -> Costs:
        """Return a snapshot."""
        with self._lock:
            self._catch_up()
            sums = (self._stages, self._runs, self._tenants, self._backends)
            return Costs(Spent(*self._total), *({key: Spent(*spent) for key, spent in each.items()} for each in sums))
