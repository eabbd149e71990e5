"""What calls cost, summed per stage, run, tenant and backend."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from orla_lg.core.bounded import BoundedDict
from orla_lg.core.record import Record

KEEP_RUNS = 1_000
"""The sums of so many runs are kept, the newest."""

KEEP_OTHERS = 10_000
"""Of stages, and of tenants, which may be as many as there are users."""


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

    def plus(self, record: Record) -> Spent:
        """Return the sum with one more call."""
        return Spent(
            self.usd + (record.cost_usd or 0.0),
            self.calls + 1,
            self.prompt_tokens + (record.prompt_tokens or 0),
            self.cached_tokens + (record.cached_tokens or 0),
            self.completion_tokens + (record.completion_tokens or 0),
        )


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
    """Sums records; ``add`` is called once for each call that reached a backend."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._total = Spent()
        self._stages = BoundedDict[str, Spent](KEEP_OTHERS)
        self._runs = BoundedDict[str, Spent](KEEP_RUNS)
        self._tenants = BoundedDict[str, Spent](KEEP_OTHERS)
        self._backends = BoundedDict[str, Spent](KEEP_OTHERS)

    def add(self, record: Record) -> None:
        """Count one call; calls that were not ours, or were never placed, cost nothing here."""
        if record.external or record.backend is None:
            return
        with self._lock:
            self._total = self._total.plus(record)
            for sums, key in (
                (self._stages, record.stage),
                (self._runs, record.run),
                (self._tenants, record.tenant),
                (self._backends, record.backend),
            ):
                if key is not None:
                    sums.set(key, (sums.get(key) or Spent()).plus(record))

    def statistics(self) -> Costs:
        """Return a snapshot."""
        with self._lock:
            sums = (self._stages, self._runs, self._tenants, self._backends)
            return Costs(self._total, *(dict(each.items()) for each in sums))
