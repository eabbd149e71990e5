"""Cores of two pools as processes on one store in a file: one is killed, and a standby takes over for its pool."""

from __future__ import annotations

import signal
from contextlib import ExitStack
from pathlib import Path

from orla_lg import Orla
from tests.link.test_reconnect import Run
from tests.serve.pools.served import Pools, graph, hi, until
from tests.serve.processes import Served, serving, until_ready
from tests.stub_engine import Gate, Reply


def test_a_pools_core_is_killed_and_its_calls_go_on_elsewhere(pools: Pools, tmp_path: Path) -> None:
    gate = Gate()
    with ExitStack() as stack:

        def core(pool: str, *more: str) -> Served:
            words = ["--config", str(pools.file), "--store", "cores.db", "--port", "0", "--pool", pool, *more]
            return stack.enter_context(serving(tmp_path, words))

        fast, large = core("fast"), core("large")
        standby = core("large", "--standby")
        with Orla.remote(fast.url) as orla:
            cores = orla.core.serving.cores.by_pool  # type: ignore[attr-defined]
            until(lambda: "large" in cores and cores["large"].link.up)
            think, draft = orla.wrap(graph("think")), orla.wrap(graph("draft"))
            think.invoke(hi())
            pools.engines["big"].rule = lambda seen: Reply(gate=gate)
            held = [Run(think) for _ in range(2)]
            pools.engines["big"].wait(lambda engine: engine.in_flight == 2)
            pools.engines["big"].rule = None
            waits = Run(think)
            large.signal(signal.SIGKILL)
            draft.invoke(hi())
            until_ready(standby)
            assert waits.is_alive() and pools.engines["big"].peak == 2, "the bound holds over the kill"
            gate.open()
            for run in (*held, waits):
                run.result()
            assert pools.engines["big"].peak == 2 and len(pools.engines["big"].chats) == 4
            assert all(record.error is None for record in orla.records())
