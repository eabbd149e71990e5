"""The controls: faults with one part spoilt, which must break the bound; else the other runs prove nothing."""

from __future__ import annotations

import time
from random import Random

from orla_lg.serve.link.orphans import TELLING_LETS_GO_S
from tests.scale_faults.kinds import (
    CUT_OFF,
    LONG_S,
    Kind,
    core_killed_and_a_replica_late,
    redis_and_core_killed,
    replica_killed,
)
from tests.scale_faults.processes import Server, monotonic
from tests.scale_faults.site import REPLICA_LEASE_S, Site


def no_roster(site: Site, dice: Random) -> None:
    core_killed_and_a_replica_late(site, dice, "roster")


def fixed_grace(site: Site, dice: Random) -> None:
    core_killed_and_a_replica_late(site, dice, "grace")


def hang_ups_forgotten(site: Site, dice: Random) -> None:
    """The core sees that a replica was killed, and gives its places on while the engine still works for it."""
    core = spoilt_core(site, "hang-ups")
    replica_killed(site, dice)
    core.kill()
    site.await_warm()


def no_lease(site: Site, dice: Random) -> None:
    """A core that heeds no lease is followed by another one, which a replica finds that begins now."""
    follower = site.standby_of(spoilt_core(site, "lease")).await_state("ready")
    late = site.start_replica("--only", str(follower.port), "--long-s", str(LONG_S)).await_ready()
    beyond(site)
    site.kill_replica(late)
    sound_again(site)


def any_epoch(site: Site, dice: Random) -> None:
    """All replicas are with the core after it, when one goes back that looks at no epoch.

    The spoilt core takes what the others had by it for calls of lost replicas, and the engine says that it is full:
    their places are held for as long as such a report is believed.
    """
    spoilt = spoilt_core(site, "lease")
    follower = site.standby_of(spoilt).await_state("ready")
    for each in site.replicas:
        each.say(only=follower.port, drops=True)
    back = site.start_replica("--any-epoch", "--only", str(follower.port), "--long", "9", "--long-s", str(LONG_S))
    back.await_ready()
    site.await_full()
    back.say(only=spoilt.port, drops=True)
    beyond(site, TELLING_LETS_GO_S)
    site.kill_replica(back)
    sound_again(site)


def believed_though_it_forgot(site: Site, dice: Random) -> None:
    """Redis is killed that keeps nothing, and with it the core; cores believe what it says afterwards."""
    assert site.redis is not None
    spoilt_core(site, "memory", standby="memory")
    site.redis.kill()
    site.start_redis(durable=False)
    site.flow(monotonic())
    redis_and_core_killed(site, dice, durable=False)
    site.redis.kill()
    site.start_redis()
    sound_again(site)


def spoilt_core(site: Site, part: str, *, standby: str = "") -> Server:
    """Let a core decide with one of its parts spoilt, and another one stand by, sound or not; returns the first."""
    core = site.await_warm()
    spoilt = site.start_core(site.standby_of(core).seat, part)
    site.await_warm()
    core.kill()
    spoilt.await_state("ready")
    site.await_full()
    site.start_core(core.seat, standby)
    return spoilt


def beyond(site: Site, patience_s: float = 0.0) -> None:
    """Wait until a bound is broken, if one is: a lease of a replica, what engines are given to notice, and longer."""
    end_s = monotonic() + 2 * REPLICA_LEASE_S + 6.0 + patience_s
    while monotonic() < end_s and not site.is_beyond():
        time.sleep(0.1)


def sound_again(site: Site) -> None:
    """Start both cores again, sound ones, and let each replica find them."""
    for core in site.cores:
        core.kill()
    for each in site.replicas:
        each.say(only=0)
    for core in list(site.cores):
        site.start_core(core.seat)
    site.await_warm()
    site.flow(monotonic())


CONTROLS: dict[str, Kind] = {
    "control: nothing waits for the roster": Kind(no_roster, 5, LONG_S),
    "control: a fixed grace of 1 s": Kind(fixed_grace, 5, LONG_S),
    "control: hang-ups are not waited for": Kind(hang_ups_forgotten, 8, 3.0, apart=False),
    "control: a core heeds no lease": Kind(no_lease, 1, LONG_S, CUT_OFF),
    "control: a replica heeds no epoch": Kind(any_epoch, 1, LONG_S, CUT_OFF),
    "control: a Redis that forgot is believed": Kind(believed_though_it_forgot, 2, LONG_S, CUT_OFF, needs_redis=True),
}
"""Each must have more calls at an engine than its bound, in one of so many faults at most."""

FIRST = ("control: nothing waits for the roster", "control: hang-ups are not waited for")
"""Those that a short run makes."""
