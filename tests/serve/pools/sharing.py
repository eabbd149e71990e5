"""Several pools on one store in virtual time, and the truth about what was spent, which no core knows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from orla_lg.core.call import NO_HINTS, Ask, Call
from orla_lg.core.identity import Identity
from orla_lg.core.limits.book import BudgetReservation, LimitBook
from orla_lg.core.limits.limits import NO_LIMITS, Limit, LimitScope
from orla_lg.core.limits.usage import NOTHING, SliceSpent, UsageAccount
from orla_lg.core.limits.usage import Amount as Used
from orla_lg.core.lookahead.run_share import RunShare
from orla_lg.errors import BudgetExceeded
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.pools.at_once import PooledSlots
from orla_lg.serve.pools.directory import CorePlace, Directory
from orla_lg.serve.pools.held import HeldSlice
from orla_lg.serve.pools.slices import SliceBook
from orla_lg.serve.store.store import Conflict, Fence, Instant, MemoryStore, StoreUnavailable, Versioned

KEY = "k1"
STEP_S = 0.25
ENDS_S = 5.0
"""After so long without a core a replica has ended its requests."""

CALL = Call("c", Identity("w", None, "draft", None), Ask("m", ()), NO_HINTS, NO_HINTS, 0.0, RunShare(0.0))


class VirtualTime:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.s = 1000.0

    def __call__(self) -> float:
        return self.s

    def instant(self) -> Instant:
        """The same, as a store's leases have it."""
        return Instant(self.s, "boot", self.s)


class FaultyStore(MemoryStore):
    """A store that does what it is asked and loses the answer, does it later, or does not answer at all."""

    def __init__(self, time: VirtualTime) -> None:
        super().__init__(now=time.instant)
        self.faults = list[str]()
        """Of the operations to come: ``lost``, ``late`` or ``away``; an empty text: none."""
        self.late = list[Callable[[], object]]()
        self.counts = {"get": 0, "put": 0, "lease": 0, "scan": 0}

    def _meets(self, what: str, done: Callable[[], Any]) -> Any:
        self.counts[what] += 1
        fault = self.faults.pop(0) if self.faults else ""
        if fault == "late":
            self.late.append(done)
        elif fault == "lost":
            done()
        elif not fault:
            return done()
        raise StoreUnavailable(f"{what}: the answer is {fault}")

    def get(self, key: str) -> Versioned | None:
        found: Versioned | None = self._meets("get", lambda: MemoryStore.get(self, key))
        return found

    def put(self, key: str, value: bytes | None, *, expected: int | None = None, fence: Fence | None = None) -> int:
        version: int = self._meets("put", lambda: MemoryStore.put(self, key, value, expected=expected, fence=fence))
        return version

    def lease(self, name: str, holder: str, ttl_s: float) -> Any:
        return self._meets("lease", lambda: MemoryStore.lease(self, name, holder, ttl_s))

    def scan(self, prefix: str) -> dict[str, Versioned]:
        found: dict[str, Versioned] = self._meets("scan", lambda: MemoryStore.scan(self, prefix))
        return found

    def arrive(self) -> None:
        """Have what was late happen now."""
        late, self.late = self.late, []
        for done in late:
            try:
                done()
            except Conflict:
                continue


@dataclass(eq=False)
class Running:
    """A call that was let in."""

    core: PoolCore
    used: Used
    at_engine: bool
    release: Callable[[Used], None]
    adopted: bool = False


@dataclass(eq=False)
class PoolCore:
    """A core of one pool, as far as its limits go."""

    world: World
    pool: str
    epoch: int
    is_frozen: bool = False
    is_deposed: bool = False
    slices: SliceBook = field(init=False)
    book: LimitBook = field(init=False)
    slots: PooledSlots = field(init=False)

    def __post_init__(self) -> None:
        world = self.world
        self.book = LimitBook(NO_LIMITS, world.time)
        self.slices = SliceBook(
            world.store, self.pool, lock=self.book.lock, epoch=lambda: self.epoch, clock=world.time, wall=world.time,
            ends_s=ENDS_S,
        )  # fmt: skip
        self.book.sliced = self.slices.slice_of
        self.slots = PooledSlots(self.slices)

    @property
    def layers(self) -> list[LimitScope]:
        return [LimitScope(NO_LIMITS, "key/k/0", whole=self.world.limit, name="ci")]

    @property
    def account(self) -> UsageAccount | None:
        found = [account for _, _, account in self.book.spent()]
        return found[0] if found else None

    def enter(self, used: Used, *, refuses: bool = True) -> Callable[[Used], None] | None:
        """Let a call in, if it fits; returns what ends it."""
        if self.world.is_at_once:
            return self._slot(refuses=refuses)
        try:
            held = self.book.promise(CALL, self.layers, None, used, refuses=refuses)
        except (BudgetExceeded, SliceSpent):
            return None
        return lambda spent: self._settle(held, spent)

    def _slot(self, *, refuses: bool) -> Callable[[Used], None] | None:
        most = self.world.limit.calls
        assert most is not None
        slot: HeldSlot | None = self.slots.take(KEY, most, refuses)
        return None if slot is None else lambda spent: slot.release()

    def _settle(self, held: BudgetReservation, spent: Used) -> None:
        self.book.settle(held, spent)


class World:
    """The store, the cores, and what was really used.

    Args:
        limit: That holds over all pools.
        pools: How many there are.
        is_at_once: Whether it is one of calls at once.
        made: Makes a core; for controls that must fail.
    """

    def __init__(
        self, limit: Limit, pools: int, *, is_at_once: bool = False, made: Callable[..., PoolCore] = PoolCore
    ) -> None:
        self.limit, self.is_at_once, self.made = limit, is_at_once, made
        self.time = VirtualTime()
        self.store = FaultyStore(self.time)
        self.pools = [f"pool-{number}" for number in range(pools)]
        for pool in self.pools:
            Directory(self.store).announce(CorePlace(pool, (), 1))
        self.running = list[Running]()
        self.spent = list[tuple[float, Used]]()
        self.kept: dict[str, list[tuple[float, Used]]] = {pool: [] for pool in self.pools}
        """What a pool's spent entries say."""
        self._unkept: dict[str, list[tuple[float, Used]]] = {pool: [] for pool in self.pools}
        self.cores: dict[str, PoolCore | None] = {pool: made(self, pool, 1) for pool in self.pools}
        self.old = list[PoolCore]()
        """Those that were frozen while another one took over."""
        self.epochs = dict.fromkeys(self.pools, 1)
        self.died_s: dict[str, float] = {}

    @property
    def live(self) -> list[PoolCore]:
        return [core for core in self.cores.values() if core is not None and not core.is_frozen]

    # What happens

    def call(self, core: PoolCore, used: Used) -> Running | None:
        """A call comes to a core."""
        release = core.enter(used)
        if release is None:
            return None
        call = Running(core, used, False, release)
        self.running.append(call)
        self.grant()
        return call

    def grant(self) -> None:
        """Let calls go to their engines that were let in, where their core may."""
        for call in self.running:
            core = call.core
            if not call.at_engine and core in self.live and core.slices.may_grant():
                call.at_engine = True

    def end(self, call: Running, *, fails: bool = False) -> None:
        """A call ends, as its replica says; its core hears of it if it lives."""
        if call not in self.running:
            return
        spent = NOTHING if fails or not call.at_engine else call.used
        self.running.remove(call)
        if call.at_engine:
            self._book(call.core.pool, spent)
        if not call.core.is_frozen:
            call.release(spent)

    def _book(self, pool: str, spent: Used) -> None:
        if spent != NOTHING:
            self.spent.append((self.time.s, spent))
            self._unkept[pool].append((self.time.s, spent))

    def keep_spent(self, pool: str) -> None:
        """Write the pool's spent entries, as a live core does each second."""
        if self.cores[pool] in self.live:
            self.kept[pool] += self._unkept[pool]
            self._unkept[pool] = []

    def work(self) -> None:
        """All cores look after their slices."""
        for core in [*self.live, *(core for core in self.old if not core.is_frozen)]:
            core.slices.work()
        self.grant()

    def pass_time(self, seconds: float) -> None:
        """Let time pass, with what happens in it."""
        until_s, began_s = self.time.s + seconds, self.time.s
        while self.time.s < until_s:
            self.time.s += STEP_S if self.time.s - began_s < 2.0 else 4 * STEP_S
            self._hang_up()
            self.work()

    def _hang_up(self) -> None:
        """Have replicas end their requests that had no core for too long; what they used is spent."""
        for call in list(self.running):
            core = call.core
            since_s = self.died_s.get(core.pool)
            if since_s is not None and call.at_engine and self.time.s - since_s >= ENDS_S:
                self._book(core.pool, call.used)
                self.running.remove(call)

    def die(self, pool: str) -> None:
        """Kill a core; its calls at engines run on, what waits is lost."""
        core = self.cores[pool]
        if core is None:
            return
        self.cores[pool] = None
        self.died_s.setdefault(pool, self.time.s)
        self.running = [call for call in self.running if call.core is not core or call.at_engine]

    def freeze(self, pool: str) -> None:
        core = self.cores[pool]
        if core is not None and not core.is_frozen:
            core.is_frozen = True
            self.died_s.setdefault(pool, self.time.s)

    def thaw(self, pool: str) -> None:
        """Let a core go on as if nothing had been."""
        core = self.cores[pool]
        if core is not None and core.is_frozen:
            core.is_frozen = False
            self.died_s.pop(pool, None)
            self._forget_hung_up(core)
        for old in self.old:
            if old.pool == pool:
                old.is_frozen = False

    def _forget_hung_up(self, core: PoolCore) -> None:
        """Its replicas say what they still hold; of what they hung up nothing is booked here but in the truth."""

    def take_over(self, pool: str) -> None:
        """Have the next core of a pool begin: it has the spent entries, and adopts what still runs."""
        before = self.cores[pool]
        if before in self.live:
            return
        if before is not None:
            self.old.append(before)
            before.is_deposed = True
        self.epochs[pool] += 1
        core = self.cores[pool] = self.made(self, pool, self.epochs[pool])
        self.died_s.pop(pool, None)
        if not self.is_at_once:
            for at_s, used in self.kept[pool]:
                now, self.time.s = self.time.s, at_s
                core.book.settle(core.book.promise(CALL, core.layers, None, used, refuses=False), used)
                self.time.s = now
        self._unkept[pool] = []
        for call in self.running:
            if call.core.pool == pool and call.at_engine:
                release = core.enter(call.used, refuses=False)
                assert release is not None
                call.core, call.release, call.adopted = core, release, True
        self.running = [call for call in self.running if call.core.pool != pool or call.at_engine]

    # The truth

    def used(self) -> Used:
        """Return what is spent, and promised to calls at engines."""
        found = NOTHING
        if not self.is_at_once:
            since_s = -1.0 if self.limit.per_s is None else self.time.s - self.limit.per_s
            for at_s, used in self.spent:
                found = found.plus(used) if at_s > since_s else found
        for call in self.running:
            found = found.plus(call.used) if call.at_engine else found
        return found

    def check(self) -> None:
        """Assert that nothing exceeds the limit."""
        used, limit = self.used(), self.limit
        over = limit.calls is not None and used.calls > limit.calls
        over |= limit.tokens is not None and used.tokens > limit.tokens
        assert not over, f"{used} of {limit}"


class Forgetful(PoolCore):
    """A control: the next core of a pool begins with what its accounts know, whatever its share says."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.book.sliced = self._sliced

    def _sliced(self, *given: Any) -> HeldSlice | None:
        held = self.slices.slice_of(*given)
        if held is not None:
            held.is_known = True
        return held


class WholeLimit(PoolCore):
    """A control: each core keeps the whole limit by itself."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.book.sliced = None

    def _slot(self, *, refuses: bool) -> Callable[[Used], None] | None:
        taken = sum(call.core is self for call in self.world.running)
        full = refuses and taken >= (self.world.limit.calls or 0)
        return None if full else lambda spent: None


class EqualPart(PoolCore):
    """A control: each core has an equal part of the limit, and no lease of anything."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.book.sliced = None

    @property
    def layers(self) -> list[LimitScope]:
        cores, limit = len(self.world.pools), self.world.limit
        part = Limit(
            calls=None if limit.calls is None else limit.calls // cores,
            tokens=None if limit.tokens is None else limit.tokens // cores, per_s=limit.per_s,
        )  # fmt: skip
        return [LimitScope(NO_LIMITS, "key/k/0", whole=part, name="ci")]
