"""The load: runs that begin at random instants, in threads and on a loop, some of them cancelled."""

from __future__ import annotations

import asyncio
import concurrent.futures
import gc
import random
import threading
import time
import uuid
from contextlib import aclosing, closing
from typing import Any

from bench.soak.account import STUCK_S, UsageAccount
from bench.soak.workflows import FORMS, PLANS, Edge, Graphs, Run, draw_plan

CALLS_OF_RUN = 8.8
"""On the average, with those that end early; what makes runs out of a rate of calls."""
RETURNING, VISITS = 30, 4
"""Threads that are returned to, and how often until they are deleted."""
MAX_OPEN = 300
WORKERS = 64


class Load:
    """Begins runs of *graph*, which is that of *graphs*, wrapped or bare, at the rate that is asked for."""

    def __init__(self, graphs: Graphs, graph: Any, account: UsageAccount, *, rate: float, seed: int) -> None:
        self.next_s = time.monotonic()
        self._graphs, self._account = graphs, account
        self._graph = graph
        self._pause_s = CALLS_OF_RUN / rate
        self._dice = random.Random(seed)
        self._number = 0
        self._visits: dict[str, int] = {}
        self._busy: set[str] = set()
        self._pool = concurrent.futures.ThreadPoolExecutor(WORKERS, "soak")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="soak-loop", daemon=True)
        self._thread.start()

    def step(self, now: float) -> None:
        """Begin what is due."""
        while self.next_s <= now:
            self.next_s += self._dice.expovariate(1.0 / self._pause_s)
            if self._account.stuck() >= MAX_OPEN:
                self._account.counts["not begun: too many open"] += 1
            else:
                self._begin()

    def settle(self, *, all_of_them: bool = False) -> None:
        """Judge what ended a while ago, and delete the threads that are not returned to."""
        for run in self._account.settle(all_of_them=all_of_them):
            self._graphs.runs.pop(run.number)
            self._busy.discard(run.thread)
            visits = self._visits[run.thread] = self._visits.get(run.thread, 0) + 1
            if not run.thread.startswith("again") or visits >= VISITS:
                del self._visits[run.thread]
                self._graph.checkpointer.delete_thread(run.thread)

    def wait(self) -> int:
        """Wait for the runs under way; returns how many do not end."""
        until_s = time.monotonic() + STUCK_S
        while self._account.stuck() and time.monotonic() < until_s:
            time.sleep(0.05)
        stuck = self._account.stuck()
        gc.collect()  # streams in cycles with their errors
        time.sleep(1.0)
        self.settle(all_of_them=True)
        return stuck

    def close(self) -> None:
        """End threads and loop; clients of that loop, which ``Orla.close`` closes there, end first."""
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0.2), self._loop).result(10)
        self._pool.shutdown(wait=not self._account.stuck(), cancel_futures=True)
        asyncio.run_coroutine_threadsafe(self._loop.shutdown_default_executor(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    def _begin(self) -> None:
        dice = self._dice
        self._number += 1
        drawn = dice.random()
        way = Edge.GONE if drawn < 0.02 else Edge.OVER if drawn < 0.07 else Edge.ON
        thread = f"again-{dice.randrange(RETURNING)}"
        if thread in self._busy or dice.random() < 0.5:
            thread = f"once-{self._number}"
        self._busy.add(thread)
        run = Run(
            self._number, str(uuid.UUID(int=dice.getrandbits(128), version=4)), dice.choice(FORMS), way, thread,
            tuple(draw_plan(dice) for _ in range(PLANS)), dice.uniform(0.0, 0.2) if dice.random() < 0.05 else None,
        )  # fmt: skip
        self._graphs.runs[run.number] = run
        self._account.begin(run)
        if run.form in ("invoke", "stream"):
            self._pool.submit(self._go, run)
        else:
            asyncio.run_coroutine_threadsafe(self._ago(run), self._loop)

    @staticmethod
    def _config(run: Run) -> Any:
        return {"configurable": {"thread_id": run.thread, "soak": run.number}, "run_id": uuid.UUID(run.id)}

    def _go(self, run: Run) -> None:
        try:
            if run.form == "invoke":
                self._graph.invoke({"text": ""}, self._config(run))
            else:
                with closing(self._graph.stream({"text": ""}, self._config(run), stream_mode="messages")) as parts:
                    for _ in parts:
                        if run.cancel_after_s is not None:
                            run.cancelled = True
                            break
        except Exception as error:
            run.error = error.with_traceback(None)
        self._account.end(run)

    async def _ago(self, run: Run) -> None:
        try:
            async with asyncio.timeout(run.cancel_after_s):
                if run.form == "ainvoke":
                    await self._graph.ainvoke({"text": ""}, self._config(run))
                else:
                    parts = self._graph.astream({"text": ""}, self._config(run), stream_mode="messages")
                    async with aclosing(parts):
                        async for _ in parts:
                            pass
        except Exception as error:
            if isinstance(error, TimeoutError) and run.cancel_after_s is not None:
                run.cancelled = True
            else:
                run.error = error.with_traceback(None)
        self._account.end(run)
