"""From what one call takes to what so many workflows a second need, and which part is at its end first."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

HALF = 0.5
"""Of what a part can do; beyond that queues grow faster than loads."""

US = 1e-6


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked for."""

    workflows_per_s: float = 10_000.0
    calls: float = 4.0
    """Of a workflow."""
    pools: int = 64

    @property
    def calls_per_s(self) -> float:
        """Of all pools."""
        return self.workflows_per_s * self.calls


@dataclass(frozen=True, slots=True)
class PerCall:
    """What one call takes."""

    core_us: float
    """CPU of the core, messages read and written included."""
    socket_us: float = 0.0
    """CPU of the core's process beyond that: reading and writing sockets, the loop."""
    messages: float = 0.0
    """Both ways."""
    bytes: float = 0.0
    """Both ways."""

    @property
    def us(self) -> float:
        """All of a core's CPU."""
        return self.core_us + self.socket_us


@dataclass(frozen=True, slots=True)
class StoreLoad:
    """Operations of the store."""

    per_core_s: float
    """Of each core, whatever it does: leases, the directory."""
    per_run: float = 0.0
    """Of each run, for limits that each run has."""
    per_account_s: float = 0.0
    """Of each core and second, for each limit of a key or tenant that is in use there."""
    capacity_s: float = 50_000.0
    """What one store does."""

    def ops_per_s(self, demand: Demand, accounts: int = 0) -> float:
        """Return how many operations a second there are."""
        fixed = demand.pools * (self.per_core_s + accounts * self.per_account_s)
        return fixed + demand.workflows_per_s * self.per_run


def calls_per_core(us: float, load: float = HALF) -> float:
    """Return how many calls a second one core decides at a load."""
    return load / (us * US)


def cores_needed(demand: Demand, us: float, load: float = HALF) -> int:
    """Return how many cores of CPU decide all calls, none busier than *load*."""
    return math.ceil(round(demand.calls_per_s * us * US / load, 9))


def core_load(demand: Demand, us: float) -> float:
    """Return how busy each pool's core is."""
    return demand.calls_per_s / demand.pools * us * US


def ceilings(
    demand: Demand, call: PerCall, store: StoreLoad, *, accounts: int = 0, network_bytes_s: float = 1.25e9
) -> dict[str, float]:
    """Return how many workflows a second each part bears at half load, as things are shared out in *demand*.

    Args:
        demand: Its pools count, and the calls of a workflow; its rate does not.
        call: What one call takes.
        store: What the store is asked.
        accounts: Limits of keys and tenants that are in use in every pool.
        network_bytes_s: What the network at one core bears; by default 10 Gbit/s.
    """
    left = HALF * store.capacity_s - demand.pools * (store.per_core_s + accounts * store.per_account_s)
    return {
        "a pool's core": calls_per_core(call.us) * demand.pools / demand.calls,
        "the store": math.inf if not store.per_run and left > 0 else max(0.0, left) / (store.per_run or 1.0),
        "the network at a core": (
            math.inf if not call.bytes else HALF * network_bytes_s / call.bytes * demand.pools / demand.calls
        ),
    }


def first_limit(found: Mapping[str, float]) -> tuple[str, float]:
    """Return which part is at its end first, and at how many workflows a second."""
    return min(found.items(), key=lambda each: each[1])
