"""A long run: graphs with threads and subgraphs, sync and async, streamed or not, under faults and cancellations.

    make soak                                    ten minutes at 80 calls a second; run it alone
    make soak SOAK='--minutes 1 --rate 20'
    python -m bench.soak --bare                  the same graph without us: what memory and files do by themselves
    python -m bench.soak --control leak          must fail: it shows that the checks see

The engine is a process of its own that fails as each prompt says, so every fault is planned: connections refused,
reset before and in the middle of an answer, slow, garbage, 429 and 503 with Retry-After. At the end nothing may be
lost (each call has its one record, told and in the records file), each failed run must be matched to a fault that was
planned for it or to the circuit that such faults opened, and memory, open files and threads must be flat. The exit
status is 0 if all that is so, 1 if not, 130 after Ctrl-C, which ends it early with the table so far.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

from bench.lib import flags
from bench.lib.command import ended, parser, tell
from bench.lib.engines import started
from bench.soak.account import Check, UsageAccount, flat, idle, kept, most, show, zero
from bench.soak.load import Load
from bench.soak.workflows import Graphs
from orla_lg import Backend, Orla

SAMPLE_S, TELL_S = 0.5, 5.0
CLOSED = "http://127.0.0.1:9/v1"
"""The discard port: nothing listens."""
LEAST_SHARE = 0.9
"""Of the rate asked for."""
MOST_CORES = 0.93
"""One interpreter has one core: where a load takes nearly all of it, open runs pile up, and nothing is flat."""


def main() -> int:
    """Run, and return the exit status."""
    asked = options()
    account = UsageAccount(swallow=200 if asked.control == "lose" else 0, bare=asked.bare)
    with started("bench.soak.engine") as url, tempfile.TemporaryDirectory(prefix="soak-") as folder:
        records = Path(folder) / "records.jsonl"
        graphs = Graphs(url, hidden=50 if asked.control == "fault" else 0, hold=20 if asked.control == "leak" else 0)
        before = account.sample()
        account.samples.clear()
        if asked.bare:
            return _bare(asked, graphs, account)
        orla = Orla(
            [Backend("main", url, model="stub-model"), Backend("gone", CLOSED, model="stub-model")],
            mapper={"over": ["gone", "main"], "gone": "gone", "*": "main"}, keep_records=500, records_file=records,
            control=False,
        )  # fmt: skip
        orla.subscribe(account.hear)
        load = Load(graphs, orla.wrap(graphs.graph), account, rate=asked.rate, seed=asked.seed)
        driven = _drive(load, account, asked.minutes * 60.0)
        stuck, now, fault = load.wait(), orla.statistics(), _integrity(orla)
        orla.close()
        load.close()
        after = account.sample()
        account.samples.pop()
        names = ", ".join(thread.name for thread in threading.enumerate())
        checks = [
            *kept(account), *flat(account.samples), *idle(now, stuck, _written(records), account.counts["records"]),
            Check("the core's own account", fault or "in order", "in order", not fault),
            *_kept_up(account, driven, asked.rate),
            most("open files", str(after.files), after.files, before.files, 6),
            most("threads", names, after.threads, before.threads, 2),
        ]  # fmt: skip
        return _told(account, checks, driven)


def _bare(asked: argparse.Namespace, graphs: Graphs, account: UsageAccount) -> int:
    """Run the same load without us: its memory is LangGraph's, the SDK's and the allocator's."""
    load = Load(graphs, graphs.graph, account, rate=asked.rate, seed=asked.seed)
    driven = _drive(load, account, asked.minutes * 60.0)
    stuck = load.wait()
    load.close()
    checks = [*flat(account.samples), zero("runs that did not end", stuck), *_kept_up(account, driven, asked.rate)]
    return _told(account, checks, driven)


class Driven(NamedTuple):
    """A load that was kept up: seconds, CPU in cores, and whether Ctrl-C ended it."""

    seconds: float
    cores: float
    stopped: bool


def _kept_up(account: UsageAccount, driven: Driven, asked_rate: float) -> list[Check]:
    rate, least = account.counts["records"] / driven.seconds, LEAST_SHARE * asked_rate
    return [
        Check("calls a second", f"{rate:.1f}", f"at least {least:.1f}", rate >= least),
        Check("CPU, in cores", f"{driven.cores:.2f}", f"at most {MOST_CORES}; else less --rate",
              driven.cores <= MOST_CORES),
    ]  # fmt: skip


def _told(account: UsageAccount, checks: list[Check], driven: Driven) -> int:
    """Print the account; return the exit status."""
    show(account, checks, f"{driven.seconds:.0f} s{', stopped early' if driven.stopped else ''}")
    return 1 if not all(check.good for check in checks) else 130 if driven.stopped else 0


def _drive(load: Load, account: UsageAccount, seconds: float) -> Driven:
    """Keep the load up for so long."""
    used_s, stopped = time.process_time(), False
    begun = shown_s = sampled_s = time.monotonic()
    try:
        while (now := time.monotonic()) < begun + seconds:
            load.step(now)
            if now >= sampled_s + SAMPLE_S:
                sampled_s = now
                account.sample()
                load.settle()
            if now >= shown_s + TELL_S:
                shown_s = now
                _show(account, now - begun, seconds)
            time.sleep(max(0.0, min(load.next_s, sampled_s + SAMPLE_S) - time.monotonic()))
    except KeyboardInterrupt:
        tell("stopped; waiting for the runs under way", last=True)
        stopped = True
    taken_s = time.monotonic() - begun
    cores = (time.process_time() - used_s) / taken_s
    if not stopped:
        _show(account, taken_s, seconds, last=True)
    return Driven(taken_s, cores, stopped)


def _show(account: UsageAccount, at_s: float, of_s: float, *, last: bool = False) -> None:
    counts, sample = account.counts, account.samples[-1]
    tell(
        f"{at_s:4.0f} of {of_s:.0f} s: {counts['records']:,} calls ({counts['records'] / at_s:.0f}/s), "
        f"{counts['failed']:,} runs failed, {counts['cancelled']:,} cancelled, {sample.rss / 1e6:.0f} MB, "
        f"{sample.files} files, {len(account.oddities)} oddities",
        last=last,
    )


def _integrity(orla: Orla) -> str:
    try:
        orla.core.serving.check_integrity()
    except AssertionError as error:
        return f"broken: {error}"
    return ""


def _written(path: Path) -> int:
    """Return how many records are in the file; what became known of one later is a line without an ``id``."""
    if not path.exists():
        return 0
    with path.open("rb") as lines:
        return len({read["id"] for line in lines if "id" in (read := json.loads(line))})


def options() -> argparse.Namespace:
    options = parser("soak", __doc__)
    add = options.add_argument
    add("--minutes", type=flags.above_zero, default=10.0, help="how long (default: %(default)s)")
    add("--rate", type=flags.above_zero, default=80.0, help="model calls a second (default: %(default)s)")
    add("--seed", type=flags.whole, default=0, help="of faults, forms and arrivals (default: %(default)s)")
    add("--bare", action="store_true", help="the same graph without us, as a control of what its memory does")
    add("--control", choices=("leak", "lose", "fault"),
        help="break something in the harness, so that it must fail: keep streams open, swallow records, or let calls "
        "meet faults that no plan has")  # fmt: skip
    return options.parse_args()


if __name__ == "__main__":
    sys.exit(ended(main, "before the load began"))
