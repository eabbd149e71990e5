"""The engine: a process of its own that fails as each prompt says, and ends with its parent.

A prompt names a call, its fault, and how often that is to happen: ``[call 17.0 reset 1]``. So every fault is one that
the load planned, and what came of a run is compared with its plan.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections import OrderedDict

from orla_lg.testing.faults import OK, Fault, FaultEngine, Reply, Seen
from orla_lg.testing.faults.reply import reply_for

KEPT_CALLS = 5_000
SLOW_S, RETRY_AFTER_S = 0.3, 0.2
_PLAN = re.compile(r"\[call (\S+) (\S+) (\d+)\]")


class Rule:
    """Answers each request as its prompt says; remembers how often a call came."""

    def __init__(self) -> None:
        self._came: OrderedDict[str, int] = OrderedDict()

    def __call__(self, seen: Seen) -> Reply:
        """Return how to treat a request."""
        found = _PLAN.search(seen.last)
        if found is None or found[2] == "none":
            return OK
        call, fault, times = found[1], found[2], int(found[3])
        came = self._came[call] = self._came.pop(call, 0) + 1
        if len(self._came) > KEPT_CALLS:
            self._came.popitem(last=False)
        if came > times:
            return OK
        slow_s = SLOW_S if fault == Fault.SLOW_FIRST_TOKEN else SLOW_S / 10
        return reply_for(Fault(fault), slow_s=slow_s, retry_after_s=RETRY_AFTER_S)


async def serve() -> None:
    """Serve until standard input ends."""
    engine = FaultEngine(any_model=True, context_tokens=None, prefix_cache=False, rule=Rule())
    engine.keep_log = False
    await engine.serve()
    print(engine.url, flush=True)
    await asyncio.to_thread(sys.stdin.read)
    await engine._stop()


if __name__ == "__main__":
    asyncio.run(serve())
