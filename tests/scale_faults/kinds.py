"""The kinds of faults."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from tests.scale_faults.account import Flow
from tests.scale_faults.processes import Caller, Server, monotonic
from tests.scale_faults.site import CORE_LEASE_S, REPLICA_LEASE_S, Site

LATE_S = 4.0
"""So much later than the others a replica finds the next core, where one is made late; within its lease."""
LONG_S = 8.0
"""What calls take that outlive the outage and the lateness together."""
LONGER_S = REPLICA_LEASE_S + 5.0
"""What they take that outlive a lease."""
SOME_S = 2.0
FROZEN_S = 2.5
"""Longer than a connection may be silent, and shorter than any lease of a replica."""
AWAY_S = 4.0
"""Longer than the lease of a core."""
CUT_OFF = frozenset({"BackendUnavailable"})
"""How a call ends whose replica was without a core for longer than its lease."""

Fault = Callable[[Site, Random], Flow | None]


@dataclass(frozen=True)
class Kind:
    """A kind of fault; ``make`` makes one, and leaves the site well."""

    make: Fault
    times: int
    """In a whole run; of a control, at most."""
    long_s: float = SOME_S
    """What calls take at the engine that they fill."""
    may_end_with: frozenset[str] = frozenset()
    needs_redis: bool = False
    apart: bool = True
    """Whether core and standby are on machines of their own: else the one sees that the other's process has ended."""
    gateways: bool = False
    """Whether two gateways stand before the core, with HTTP clients that ask the other one where one is silent."""


# Cores


def core_killed(site: Site, dice: Random) -> Flow:
    core = site.await_warm()
    time.sleep(dice.uniform(0.0, 0.4))
    fault_s = monotonic()
    core.kill()
    flows = site.flow(fault_s)
    site.start_core(core.seat)
    return flows


def core_killed_and_a_replica_late(site: Site, dice: Random, spoilt: str = "") -> Flow:
    core = site.await_warm()
    if spoilt:
        site.start_core(site.standby_of(core).seat, spoilt)
        site.await_warm()
    late = dice.choice(site.await_busy(site.replicas))
    late.say(late_s=LATE_S)
    time.sleep(0.1)
    fault_s = monotonic()
    core.kill()
    flows = site.flow(fault_s)
    time.sleep(1.0)
    if spoilt:
        site.core.kill()
        site.start_core(site.standby_of(core).seat)
    site.start_core(core.seat)
    return flows


def core_frozen_and_followed(site: Site, dice: Random) -> Flow:
    core = site.await_warm()
    time.sleep(dice.uniform(0.0, 0.4))
    fault_s = monotonic()
    core.freeze()
    try:
        flows = site.flow(fault_s)
        time.sleep(dice.uniform(0.0, 1.0))
    finally:
        core.thaw()
    return flows


def core_frozen_for_a_moment(site: Site, dice: Random) -> Flow:
    core = site.await_warm()
    fault_s = monotonic()
    core.freeze()
    time.sleep(dice.uniform(0.2, 1.0) * CORE_LEASE_S)
    core.thaw()
    return site.flow(fault_s)


def core_cut_off_from_its_store(site: Site, dice: Random) -> Flow:
    core = site.await_warm()
    fault_s = monotonic()
    site.store_relays[core.seat].cut(AWAY_S, silently=dice.random() < 0.5)
    flows = site.flow(fault_s + 0.5 * CORE_LEASE_S)
    time.sleep(max(0.0, fault_s + AWAY_S - monotonic()))
    return flows


# Standbys


def standby_killed(site: Site, dice: Random) -> Flow:
    standby = site.standby_of(site.await_warm())
    fault_s = monotonic()
    standby.kill()
    flows = site.flow(fault_s)
    site.start_core(standby.seat)
    return flows


def standby_frozen_and_core_killed(site: Site, dice: Random) -> Flow:
    """The standby takes over as soon as it is thawed."""
    core = site.await_warm()
    standby, fault_s = site.standby_of(core), monotonic()
    standby.freeze()
    core.kill()
    time.sleep(dice.uniform(0.0, CORE_LEASE_S))
    standby.thaw()
    flows = site.flow(fault_s)
    site.start_core(core.seat)
    return flows


# Replicas


def replica_killed(site: Site, dice: Random) -> Flow:
    victim = dice.choice(site.await_busy(site.replicas))
    fault_s = monotonic()
    site.kill_replica(victim)
    flows = site.flow(fault_s)
    site.start_replica().await_ready()
    return flows


def frozen(site: Site, victim: Server | Caller, seconds: float = FROZEN_S) -> Flow:
    """Freeze a process for a time, and wait until calls flow again: while it is frozen, and after."""
    fault_s = monotonic()
    victim.freeze()
    try:
        flows = site.flow(fault_s)
        time.sleep(max(0.0, fault_s + seconds - monotonic()))
    finally:
        victim.thaw()
    site.flow(monotonic())
    return flows


def replica_frozen(site: Site, dice: Random) -> Flow:
    return frozen(site, dice.choice(site.await_busy(site.replicas)))


def replica_frozen_beyond_its_lease(site: Site, dice: Random) -> Flow:
    return frozen(site, dice.choice(site.await_busy(site.replicas)), REPLICA_LEASE_S + 1.5)


def core_and_replica_killed(site: Site, dice: Random) -> Flow:
    core = site.await_warm()
    victim = dice.choice(site.await_busy(site.replicas))
    fault_s = monotonic()
    core.kill()
    site.kill_replica(victim)
    flows = site.flow(fault_s)
    site.start_core(core.seat)
    site.start_replica().await_ready()
    return flows


def core_killed_and_replica_frozen(site: Site, dice: Random) -> Flow:
    core = site.await_warm()
    victim, fault_s = dice.choice(site.await_busy(site.replicas)), monotonic()
    victim.freeze()
    core.kill()
    try:
        flows = site.flow(fault_s)
    finally:
        victim.thaw()
    site.start_core(core.seat)
    site.flow(monotonic())
    return flows


# Gateways


def gateway_killed(site: Site, dice: Random) -> Flow:
    victim, fault_s = site.await_busy_gateway(dice), monotonic()
    victim.kill()
    flows = site.flow(fault_s)
    site.start_gateway(victim)
    return flows


def gateway_frozen(site: Site, dice: Random) -> Flow:
    return frozen(site, site.await_busy_gateway(dice))


def gateway_frozen_beyond_its_lease(site: Site, dice: Random) -> Flow:
    return frozen(site, site.await_busy_gateway(dice), REPLICA_LEASE_S + 1.5)


# The store


def redis_killed(site: Site, dice: Random, away_s: float = 0.0) -> Flow:
    assert site.redis is not None
    site.await_warm()
    fault_s = monotonic()
    site.redis.kill()
    time.sleep(away_s)
    site.start_redis()
    return site.flow(fault_s if not away_s else monotonic())


def redis_away(site: Site, dice: Random) -> Flow:
    return redis_killed(site, dice, AWAY_S)


def redis_frozen(site: Site, dice: Random) -> Flow:
    assert site.redis is not None
    site.await_warm()
    fault_s, seconds = monotonic(), dice.choice((0.3, AWAY_S))
    site.redis.freeze()
    time.sleep(seconds)
    site.redis.thaw()
    return site.flow(fault_s if seconds < 1.0 else monotonic())


def redis_and_core_killed(site: Site, dice: Random, *, durable: bool = True) -> Flow:
    assert site.redis is not None
    core = site.await_warm()
    late = dice.choice(site.await_busy(site.replicas))
    late.say(late_s=LATE_S)
    time.sleep(0.1)
    fault_s = monotonic()
    site.redis.kill()
    core.kill()
    site.start_redis(durable=durable)
    flows = site.flow(fault_s)
    time.sleep(1.0)
    site.start_core(core.seat)
    return flows


KINDS: dict[str, Kind] = {
    "core killed": Kind(core_killed, 40),
    "core killed, standby on its machine": Kind(core_killed, 10, apart=False),
    "core killed, a replica late, calls of 8 s": Kind(core_killed_and_a_replica_late, 25, LONG_S),
    "core frozen, standby follows, thawed": Kind(core_frozen_and_followed, 20),
    "core frozen for less than its lease": Kind(core_frozen_for_a_moment, 10),
    "core cut off from its store": Kind(core_cut_off_from_its_store, 10, needs_redis=True),
    "standby killed": Kind(standby_killed, 10),
    "core killed, standby frozen and thawed": Kind(standby_frozen_and_core_killed, 8),
    "replica killed, hang-ups noticed late": Kind(replica_killed, 20, 3.0),
    "replica frozen": Kind(replica_frozen, 10),
    "replica frozen beyond its lease": Kind(replica_frozen_beyond_its_lease, 6, LONGER_S, CUT_OFF),
    "core and replica killed": Kind(core_and_replica_killed, 8, LONG_S),
    "core killed, replica frozen": Kind(core_killed_and_replica_frozen, 6, LONG_S, CUT_OFF),
    "gateway killed": Kind(gateway_killed, 10, gateways=True),
    "gateway frozen": Kind(gateway_frozen, 6, gateways=True),
    "gateway frozen beyond its lease": Kind(gateway_frozen_beyond_its_lease, 4, LONGER_S, gateways=True),
    "core killed, HTTP clients at gateways": Kind(core_killed, 6, gateways=True),
    "Redis killed and started": Kind(redis_killed, 10, needs_redis=True),
    "Redis away for 4 s": Kind(redis_away, 6, needs_redis=True),
    "Redis frozen": Kind(redis_frozen, 8, needs_redis=True),
    "Redis and core killed, a replica late": Kind(redis_and_core_killed, 8, LONG_S, needs_redis=True),
}
"""Each with how often a whole run makes it."""

SOME = (
    "core killed",
    "core frozen, standby follows, thawed",
    "standby killed",
    "replica frozen",
    "gateway killed",
    "Redis killed and started",
)
"""Of a short run."""
