"""What it costs a call to be seen: the CPU time that metrics and a span add, and what sending spans takes beside it.

    make bench-observe                       a minute; run it alone
    make bench-observe BENCH='--rounds 30'
    python -m bench.observe --help

Calls pass the core and nothing else: no engine and no HTTP, so that microseconds show. Each arm has a core of its
own; within a round the arms take turns after every few calls, and figures are of rounds: what an arm adds to the bare
one in the same round. CPU time is the process's, all threads. In the last arm spans go by OTLP to a collector in
another process: it has its rounds to itself, and each ends when all of its spans are sent. What a bare span of
OpenTelemetry's takes, with fifteen attributes, says how fast the machine is.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from statistics import median
from typing import Any, NamedTuple

from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from prometheus_client import CollectorRegistry, generate_latest

from bench.lib.command import ended, parser, tell
from bench.lib.core import NO_HINTS, Ask, Identity, InFlightCall, Usage, drive
from bench.lib.engines import started
from bench.lib.figures import Rounds, rotated, spread, table
from bench.lib.flags import count
from orla_lg import Backend, Cost, Orla
from orla_lg.observe import metrics, traces
from orla_lg.testing.faults import FaultEngine

GOAL_US = 60.0
"""Of metrics and a span together, without what sends spans."""
OFF, METRICS, SPANS, BOTH, SENT = "off", "metrics", "spans", "both", "both, spans sent"
ARMS = (OFF, METRICS, SPANS, BOTH, SENT)
TURN = 20
"""Calls, until another arm's turn."""
USAGE = Usage(prompt_tokens=1_000, cached_tokens=800, completion_tokens=100)
ASK = Ask("auto", [{"role": "user", "content": "hello"}], stream=True)
STAGES = [f"stage-{number}" for number in range(10)]


class Block(NamedTuple):
    """What a block's calls took."""

    arm: str
    seed: int
    cpu_us: float
    """Per call."""


class NoEngine:
    """Ends each call at once, as a sender does whose engine answers."""

    max_attempts = 1

    def send(self, inflight: InFlightCall) -> None:
        tracer = inflight.services.tracer
        if tracer is not None:
            tracer.sending(inflight.call, inflight.backend, inflight.attempts)
        inflight.first_token()
        inflight.saw(USAGE)
        inflight.finish()

    asend: Any = None


class Arm:
    """A core, seen or not."""

    def __init__(self, name: str, url: str, collector: str, undo: ExitStack) -> None:
        backend = Backend("main", url, cost=Cost(1.0, 2.0, 0.1))
        self.name, self._orla = name, undo.enter_context(Orla([backend], {"*": "main"}))
        self._orla.connect()
        self.registry = CollectorRegistry()
        self._flush: Callable[[], object] = int
        if name in (METRICS, BOTH, SENT):
            undo.callback(metrics(self._orla, self.registry).close)
        if name in (SPANS, BOTH, SENT):
            provider = TracerProvider(shutdown_on_exit=False)
            undo.callback(provider.shutdown)
            if name == SENT:
                exporter = OTLPSpanExporter(f"{collector}/v1/traces")
                provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=100_000))
                self._flush = provider.force_flush
            traces(self._orla, provider)

    def call(self, number: int) -> None:
        serving = self._orla.core.serving
        call_id = serving.new_id()
        identity = Identity(f"thread-{number % 100}", None, STAGES[number % len(STAGES)], thread=True)
        inflight = serving.arrive(identity, ASK, call_id=call_id, said=NO_HINTS)
        drive(serving.serve(inflight, NoEngine()))

    def some(self, calls: int, *, last: bool = False) -> float:
        """Make calls, and return the CPU time that they took, in seconds; with *last* until their spans are sent."""
        before_s = time.process_time()
        for number in range(calls):
            self.call(number)
        if last:
            self._flush()
        return time.process_time() - before_s

    def scrape_ms(self) -> float:
        before_s = time.process_time()
        generate_latest(self.registry)
        return (time.process_time() - before_s) * 1e3


class BareSpan:
    """What OpenTelemetry takes by itself."""

    name = "a bare span"

    def __init__(self) -> None:
        self._tracer = TracerProvider(shutdown_on_exit=False).get_tracer("bench")
        self._attributes: dict[str, Any] = {f"gen_ai.attribute{n}": n if n % 2 else "value" for n in range(15)}

    def some(self, calls: int) -> float:
        before_s = time.process_time()
        for _ in range(calls):
            self._tracer.start_span("span", attributes=self._attributes).end()
        return time.process_time() - before_s


def one_round(seed: int, arms: Sequence[Arm], bare: BareSpan, calls: int) -> Iterator[Block]:
    gc.collect()
    *together, alone = arms
    took_s = dict.fromkeys((*(arm.name for arm in together), bare.name), 0.0)
    for turn in range(max(1, calls // TURN)):
        for arm in rotated((*together, bare), turn + seed):
            took_s[arm.name] += arm.some(TURN)
    made = max(1, calls // TURN) * TURN
    yield from (Block(name, seed, seconds * 1e6 / made) for name, seconds in took_s.items())
    gc.collect()
    yield Block(alone.name, seed, alone.some(made, last=True) * 1e6 / made)


def cpu_us(block: Block) -> float:
    return block.cpu_us


def added(found: Rounds[Block], arm: str, to: str = OFF) -> list[float]:
    """Return what an arm adds to another one, round by round."""
    return [a - b for a, b in zip(found.column(arm, cpu_us), found.column(to, cpu_us), strict=True)]


def report(found: Rounds[Block]) -> list[str]:
    rows = []
    for arm in found.arms:
        more = "" if arm in (OFF, BareSpan.name) else spread(added(found, arm)).shown(".1f", bold=True)
        rows.append([arm, spread(found.column(arm, cpu_us)).shown(".1f"), more])
    lines = table(["seen by", "CPU per call, µs: median (least … most of rounds)", "added, µs"], rows)
    sends = spread(added(found, SENT, BOTH)).shown(".1f")
    return [*lines, "", f"sending the spans takes {sends} µs of each call more, in a thread of its own"]


def main() -> int:
    options = parser("observe", __doc__)
    options.add_argument("--rounds", type=count, default=15, metavar="N", help="each through all arms (15)")
    options.add_argument("--calls", type=count, default=1_000, metavar="N", help="in a block (1000)")
    args = options.parse_args()
    with ExitStack() as undo:
        url = undo.enter_context(FaultEngine()).url
        at = undo.enter_context(started("bench.observe.collector"))
        arms = [Arm(name, url, at, undo) for name in ARMS]
        bare, blocks = BareSpan(), list[Block]()
        list(one_round(-1, arms, bare, 10 * TURN))  # warm
        for number in range(args.rounds):
            blocks += one_round(number, arms, bare, args.calls)
            tell(f"round {number + 1}/{args.rounds}", last=number == args.rounds - 1)
        found = Rounds(blocks, (*ARMS, bare.name))
        scrape = spread([arms[3].scrape_ms() for _ in range(20)]).shown(".1f")
    print("\n".join([*report(found), f"a scrape of {len(STAGES)} stages takes {scrape} ms"]))
    both = median(added(found, BOTH))
    print(
        f"metrics and a span add {both:.1f} µs, the goal is {GOAL_US:.0f}" + ("" if both <= GOAL_US else ": missed")
    )
    return 0 if both <= GOAL_US else 1


if __name__ == "__main__":
    sys.exit(ended(main, "stopped; nothing is kept"))
