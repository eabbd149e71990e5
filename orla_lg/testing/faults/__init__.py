"""An engine that fails on demand, for tests of whatever stands before engines.

A small real server on loopback that speaks OpenAI's chat completions, from the standard library alone::

    with FaultEngine(script=[Fault.DEAD_MID_STREAM, Fault.BUSY]) as engine:
        backend = Backend("flaky", engine.url)      # fails twice, then works

    FaultEngine(chances={Fault.RESET: 0.1, Fault.SLOW_TOKENS: 0.2}, seed=7)   # the same faults each time

Healthy, it answers each request from its messages alone, counts words as tokens, and caches prefixes.
"""

from orla_lg.testing.faults.engine import MODEL, FaultEngine
from orla_lg.testing.faults.http import Seen
from orla_lg.testing.faults.reply import OK, Fault, Gate, Reply

__all__ = ["MODEL", "OK", "Fault", "FaultEngine", "Gate", "Reply", "Seen"]
