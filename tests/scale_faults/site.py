"""A site: two engines with a bound each, a store, a core and its standby, replicas, gateways and their clients."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from random import Random
from typing import Any, Self

from tests.scale_faults.account import Call, Flow, Row, flow
from tests.scale_faults.processes import Caller, Redis, Server, free_port, until
from tests.scripted_engine import MODEL
from tests.serve_kills.processes import PATIENCE_S, Engine
from tests.serve_kills.relays import Relay, Relays

MAIN, QUICK = "main", "quick"
BOUNDS: Mapping[str, int] = {MAIN: 8, QUICK: 3}
"""Calls at once at the engine of long calls, and at that of short ones."""
CORE_LEASE_S, REPLICA_LEASE_S = 1.5, 7.0
HANG_UPS_S = 0.8
"""How late the engines notice that a request was hung up."""
SEATS = (0, 1)
CONFIG = """
[backends.main]
url = "{main}"
model = "{model}"
engine = "vllm"
max_concurrency = {main_bound}
[backends.quick]
url = "{quick}"
model = "{model}"
engine = "vllm"
max_concurrency = {quick_bound}
[mapping]
short = "quick"
"*" = "main"
[serve]
core_lease_s = {core_lease_s}
replica_lease_s = {replica_lease_s}
"""


class Site:
    """All of it; what it started ends with it. Gateways and clients are there while they are wanted."""

    def __init__(self, folder: Path, *, replicas: int, on_redis: bool, apart: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self._many, self.on_redis = folder, replicas, on_redis
        self.may_be_apart = self.apart = apart
        """Whether each core is as on a machine of its own."""
        self.config = folder / "orla.toml"
        self.ports = [free_port() for _ in SEATS]
        self.cores: list[Server] = []
        self.gateways: list[Server] = []
        self.replicas: list[Caller] = []
        self.clients: list[Caller] = []
        """Of the gateways."""
        self.all: list[Caller] = []
        """Those that were killed, too."""
        self.engines: dict[str, Engine] = {}
        self.redis: Redis | None = None
        self.store_relays: list[Relay] = []
        """Of each core, its way to the store."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.callback(self._kill_all)
            for name in BOUNDS:
                engine_folder = self.folder / name
                engine_folder.mkdir()
                self.engines[name] = stack.enter_context(Engine(engine_folder))
                self.engines[name].account(f"?late_s={HANG_UPS_S}")
            self.config.write_text(CONFIG.format(
                main=self.engines[MAIN].url, quick=self.engines[QUICK].url, model=MODEL, main_bound=BOUNDS[MAIN],
                quick_bound=BOUNDS[QUICK], core_lease_s=CORE_LEASE_S, replica_lease_s=REPLICA_LEASE_S,
            ))  # fmt: skip
            if self.on_redis:
                port = free_port()
                self.redis = Redis(port, self.folder).await_ready()
                relays = stack.enter_context(Relays(port))
                self.store_relays = [relays.open() for _ in SEATS]
            for seat in SEATS:
                self.cores.append(self._core(seat, ""))
                self.cores[seat].await_state("ready" if not seat else "standby")
            for _ in range(self._many):
                self.start_replica()
            for each in self.replicas:
                each.await_ready()
            self._stack = stack.pop_all()
        return self

    def _kill_all(self) -> None:
        for each in (*self.all, *self.gateways, *self.cores, self.redis):
            if each is not None:
                each.kill()

    @property
    def callers(self) -> list[Caller]:
        """All that call and were not killed."""
        return [*self.replicas, *self.clients]

    def told(self) -> str:
        """Return what all of it is at: what a stall is explained by."""
        engines = [
            f"engine {name}: {', '.join(f'{of} {account[of]}' for of in ('running', 'open', 'most', 'served'))}"
            for name, engine in self.engines.items() if (account := engine.account())
        ]  # fmt: skip
        servers = [each.told() for each in (*self.cores, *self.gateways)]
        return "\n".join([*engines, *servers, *(each.told() for each in self.callers)])

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    # Its processes

    def store(self, seat: int) -> str:
        """Return how a core reaches the store."""
        return (
            f"redis://127.0.0.1:{self.store_relays[seat].port}/0" if self.on_redis else f"{self.folder / 'state.db'}"
        )

    def _core(self, seat: int, spoilt: str) -> Server:
        module = ["-m", "tests.scale_faults.spoilt", spoilt] if spoilt else ["-m", "orla_lg"]
        words = [*module, "serve", "--config", str(self.config), "--port", str(self.ports[seat]), "--store",
                 self.store(seat), "--standby"]  # fmt: skip
        return Server("core", seat, self.ports[seat], words, self.folder / f"core-{seat}.log", apart=self.apart)

    def start_core(self, seat: int, spoilt: str = "") -> Server:
        """Start a core in its seat, where none is any more."""
        self.cores[seat].kill()
        self.cores[seat] = self._core(seat, spoilt)
        return self.cores[seat]

    @property
    def address(self) -> str:
        """Where the cores are."""
        return ",".join(f"http://127.0.0.1:{port}" for port in self.ports)

    def _gateway(self, seat: int, port: int) -> Server:
        words = ["-m", "orla_lg", "serve", "--gateway", "--core", self.address, "--port", str(port)]
        return Server("gateway", seat, port, words, self.folder / f"gateway-{seat}.log", apart=self.apart)

    def start_gateway(self, gateway: Server) -> None:
        """Start a gateway in its seat, where none is any more."""
        gateway.kill()
        self.gateways[gateway.seat] = self._gateway(gateway.seat, gateway.port).await_state("ready")

    def gateways_are(self, *, there: bool) -> None:
        """Let there be two gateways with clients, or none."""
        if there and not self.gateways:
            self.gateways = [self._gateway(seat, free_port()) for seat in SEATS]
            for each in self.gateways:
                each.await_state("ready")
            urls = ",".join(each.url for each in self.gateways)
            for seat in SEATS:
                words = ["-m", "tests.scale_faults.clients", urls, "--begins-at", str(seat)]
                self.clients.append(self._caller(f"c{len(self.all)}", words))
        elif not there and self.gateways:
            for client in self.clients:
                client.say(long_s=0.01)
                client.end()
            for gateway in self.gateways:
                gateway.kill()
            self.clients, self.gateways = [], []

    def cores_are(self, *, apart: bool) -> None:
        """Let cores be on machines of their own, or on one."""
        if apart != self.apart and (self.may_be_apart or not apart):
            self.apart = apart
            for seat in SEATS:
                self.start_core(seat)
                self.await_warm()

    def _caller(self, name: str, words: Sequence[str]) -> Caller:
        caller = Caller(name, words, self.folder / f"{name}.log", seed=len(self.all))
        self.all.append(caller)
        return caller

    def start_replica(self, *options: str) -> Caller:
        words = ["-m", "tests.scale_faults.replica", self.address, self.engines[MAIN].url, *options]
        replica = self._caller(f"r{len(self.all)}", words)
        self.replicas.append(replica)
        return replica

    def kill_replica(self, replica: Caller) -> None:
        self.replicas.remove(replica)
        replica.kill()

    def start_redis(self, *, durable: bool = True) -> None:
        assert self.redis is not None
        self.redis = Redis(self.redis.port, self.folder, durable=durable).await_ready()

    # What is waited for

    def until(self, what: Callable[[], Any], why: str, patience_s: float = PATIENCE_S) -> Any:
        """Wait for something; where it does not come, all of the site says what it is at.

        Raises:
            Stall: It did not come.
        """
        return until(what, lambda: f"{why}\n{self.told()}", patience_s)

    @property
    def core(self) -> Server:
        """The one that decides."""

        def found() -> Server | None:
            return next((each for each in self.cores if each.lives and each.state == "ready"), None)

        decides: Server = self.until(found, "a core decides")
        return decides

    def standby_of(self, core: Server) -> Server:
        return self.cores[1 - core.seat]

    def await_warm(self) -> Server:
        """Wait until one core decides and the other one stands by, started again if need be; returns the first."""
        core = self.core
        standby = self.standby_of(core)
        self.until(lambda: not standby.lives or standby.state == "standby", "a standby waits")
        if not standby.lives:
            self.start_core(standby.seat)
            return self.await_warm()
        return core

    def calls_take(self, long_s: float) -> None:
        """Let long calls take so long, and wait until earlier ones have ended."""
        old = {call for each in self.callers for call in each.open_calls("long")}
        for each in self.callers:
            each.say(long_s=long_s)
        self.until(lambda: not old & self.open_calls(), "earlier calls ended")

    def await_full(self) -> None:
        """Wait until the engine of long calls is full, and each caller has calls there or waiting."""
        self.until(lambda: self.engines[MAIN].account()["running"] >= BOUNDS[MAIN], "the engine is full")
        self.until(lambda: all(each.open_calls("long") for each in self.callers), "each replica has calls")

    def await_busy(self, callers: Sequence[Caller]) -> list[Caller]:
        """Wait until the engine of long calls is full, and return the callers of these that have calls there."""
        self.await_full()

        def found() -> list[Caller]:
            at_engine = {call.partition(".")[0] for call in self.engines[MAIN].account()["calls"]}
            return [each for each in callers if each.name in at_engine]

        busy: list[Caller] = self.until(found, "one of these has calls at the engine")
        return busy

    def await_busy_gateway(self, dice: Random) -> Server:
        """Return a gateway whose clients have calls at the full engine."""
        return self.gateways[self.clients.index(dice.choice(self.await_busy(self.clients)))]

    def is_beyond(self) -> bool:
        """Whether an engine had more calls at once than its bound."""
        return any(self.engines[name].account()["most"] > bound for name, bound in BOUNDS.items())

    def open_calls(self) -> set[str]:
        return {call for each in self.callers for call in each.open_calls()}

    def calls(self) -> list[Call]:
        return [call for each in self.all for call in list(each.calls.values())]

    def flow(self, fault_s: float) -> Flow:
        """Wait until each caller that lives has short calls again, and return how long after a fault that was."""
        those = [each for each in self.callers if not each.frozen]
        names = [each.name for each in those]

        def found() -> Flow | None:
            return flow((call for each in those for call in each.begun_after(fault_s)), "short", fault_s, names)

        flows: Flow = self.until(found, "calls flow again")
        return flows

    def end(self) -> None:
        """Let what is under way end, and with it the replicas."""
        self.gateways_are(there=False)
        for each in self.replicas:
            each.say(long_s=0.01, short_s=0.01)
        for each in self.replicas:
            each.end()


class Watch:
    """The account, in ``row``, of what happens to calls between its begin and ``end``."""

    def __init__(self, site: Site, kind: str) -> None:
        self._site, self._began_s = site, time.monotonic()
        self._twice = {name: len(engine.account("?anew")["twice"]) for name, engine in site.engines.items()}
        self._killed = {each.name for each in site.all if each.killed}
        self.row = Row(kind)

    def fault(self, make: Callable[[Site, Random], Flow | None], dice: Random) -> None:
        """Make a fault, and note how long calls did not flow."""
        self.row.faults += 1
        found = make(self._site, dice)
        if found is not None:
            self.row.flows.append(found)

    def end(self) -> None:
        """Wait for the ends of the calls under way, and note what happened, and which calls are lost."""
        site = self._site
        under_way, end_s = site.open_calls(), time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s and under_way & site.open_calls():
            time.sleep(0.02)
        self.row.lost = len(under_way & site.open_calls())
        self.note()

    def note(self) -> None:
        """Note what happened so far."""
        site, row, began_s = self._site, self.row, self._began_s
        accounts: dict[str, Any] = {name: engine.account() for name, engine in site.engines.items()}
        ended = [each for each in site.calls() if each.ended_s is not None and each.ended_s >= began_s]
        row.calls = len(ended)
        row.errors = Counter(each.error.partition(":")[0] for each in ended if each.error)
        row.cut = sum(
            call.ended_s is None
            for each in site.all
            if each.killed and each.name not in self._killed
            for call in each.calls.values()
        )
        row.twice = sum(len(account["twice"]) - self._twice[name] for name, account in accounts.items())
        row.most = {name: account["most"] for name, account in accounts.items()}


def has_redis() -> bool:
    """Whether Redis is installed here, and the client with it."""
    try:
        import redis  # noqa: F401
    except ImportError:
        return False
    return shutil.which("redis-server") is not None
