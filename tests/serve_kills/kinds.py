"""The kinds of faults: each makes one of them some times under load, and returns what happened to calls."""

from __future__ import annotations

import time
from collections.abc import Callable
from random import Random

from orla_lg_llamacpp.embedded import free_port
from tests.serve_kills.pool import BOUND, CONTROL, CORE_LEASE_S, LATE_S, Pool, Row, Watch
from tests.serve_kills.processes import Core, until

SHORT_S, SOME_S = 0.02, 0.5
HANG_UPS_S = 0.8
"""How late the engine notices that a replica is gone."""
SURVIVING_S = 3 * HANG_UPS_S
FROZEN_S = 2.5
"""Longer than a connection may be silent, and shorter than any lease of a replica."""

Kind = Callable[[Pool, int, Random], Row]


def core_killed(pool: Pool, times: int, dice: Random) -> Row:
    """Kill the core in mid-load, calls being short, and start the next one at once."""
    pool.calls_take(SHORT_S)
    watch = Watch(pool, "core killed, short calls")
    for _ in range(times):
        pool.await_flow()
        time.sleep(dice.uniform(0.0, 0.3))
        pool.core.kill()
        pool.start_core()
        watch.faults += 1
        pool.await_flow()
    return watch.row()


def core_killed_under_long_calls(pool: Pool, times: int, dice: Random, module: str = "orla_lg") -> Row:
    """Kill the core while calls are at the engine that outlive the outage; one replica finds the next core late."""
    control = "; control: nothing waits for the roster" if module == CONTROL else ""
    pool.calls_take(pool.long_s, full=True)
    watch = Watch(pool, f"core killed, long calls, a replica late{control}")
    for _ in range(times):
        pool.await_full()
        until(lambda: all(each.open_calls() for each in pool.replicas), "each replica has calls")
        late = dice.choice(pool.replicas)
        pool.shut(late)
        pool.core.kill()
        pool.start_core(module).await_ready()
        pool.shut(late, LATE_S)
        watch.faults += 1
        pool.await_flow(BOUND)
    return watch.row()


def without_waiting_for_the_roster(pool: Pool, times: int, dice: Random) -> Row:
    """Do the same with a core that grants at once, which must break the bound; end with a proper core again."""
    row = core_killed_under_long_calls(pool, times, dice, CONTROL)
    pool.core.kill()
    pool.start_core()
    pool.await_flow(1)
    return row


def core_frozen(pool: Pool, times: int, dice: Random) -> Row:
    """Freeze the core for longer than its lease; it goes on by itself."""
    pool.calls_take(SOME_S)
    watch = Watch(pool, "core frozen and thawed")
    for _ in range(times):
        time.sleep(dice.uniform(0.0, 0.5))
        pool.core.freeze()
        watch.faults += 1
        time.sleep(1.5 * CORE_LEASE_S)
        pool.core.thaw()
        pool.await_flow()
    return watch.row()


def core_frozen_and_followed(pool: Pool, times: int, dice: Random) -> Row:
    """Freeze the core, let another one take over, and thaw the first: two are alive, one decides."""
    pool.calls_take(SOME_S)
    watch = Watch(pool, "core frozen, another follows, then thawed")
    for _ in range(times):
        time.sleep(dice.uniform(0.0, 0.5))
        frozen = pool.core
        frozen.freeze()
        watch.faults += 1
        port = free_port()
        pool.core = Core(pool.config, port)
        try:
            pool.core.await_ready()
            pool.relays.core_port = port
            pool.await_flow()
            frozen.thaw()
            pool.await_flow()
        finally:
            frozen.kill()
    return watch.row()


def replica_killed(pool: Pool, times: int, dice: Random) -> Row:
    """Kill a replica whose calls the engine goes on with for a while; start another one."""
    pool.engine.account(f"?late_s={HANG_UPS_S}")
    pool.calls_take(SURVIVING_S, full=True)
    watch = Watch(pool, "replica killed, hang-ups noticed late")
    for _ in range(times):
        pool.await_full()
        until(lambda: any(each.open_calls() for each in pool.replicas), "a replica has calls")
        victim = dice.choice([each for each in pool.replicas if each.open_calls()])
        pool.kill_replica(victim)
        watch.faults += 1
        pool.start_replica().await_ready().calls_take(SURVIVING_S)
        pool.await_flow()
    pool.engine.account("?late_s=0")
    return watch.row()


def replica_frozen(pool: Pool, times: int, dice: Random, seconds: float = FROZEN_S) -> Row:
    """Freeze a replica for less than its lease."""
    pool.calls_take(SOME_S)
    watch = Watch(pool, f"replica frozen for {seconds:.1f} s, its lease being {pool.replica_lease_s:.1f}")
    for _ in range(times):
        victim = dice.choice(pool.replicas)
        time.sleep(dice.uniform(0.0, 0.5))
        victim.freeze()
        watch.faults += 1
        time.sleep(seconds)
        victim.thaw()
        pool.await_flow()
    return watch.row()


def replica_frozen_beyond_its_lease(pool: Pool, times: int, dice: Random) -> Row:
    """Freeze a replica for longer than its lease, while its calls are at the engine."""
    pool.engine.account(f"?late_s={HANG_UPS_S}")
    row = replica_frozen(pool, times, dice, pool.replica_lease_s + 1.5)
    pool.engine.account("?late_s=0")
    return row


KINDS: dict[str, tuple[Kind, int]] = {
    "core killed": (core_killed, 40),
    "core killed under long calls": (core_killed_under_long_calls, 20),
    "core frozen": (core_frozen, 12),
    "core frozen and followed": (core_frozen_and_followed, 8),
    "replica killed": (replica_killed, 15),
    "replica frozen": (replica_frozen, 8),
    "replica frozen beyond its lease": (replica_frozen_beyond_its_lease, 5),
}
"""Each with how often the full run makes it: 108 times in all."""
