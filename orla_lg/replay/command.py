"""``orla-lg replay``: recorded traffic in virtual time, as it was served and as it might be."""

from __future__ import annotations

import argparse
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from orla_lg.core.policies import NAMES
from orla_lg.errors import ConfigError
from orla_lg.replay import public, reading
from orla_lg.replay.figures import TOLERANCE
from orla_lg.replay.report import draw, text
from orla_lg.replay.study import Study, WhatIf, what_ifs
from orla_lg.replay.workload import workload_of

DESCRIPTION = """\
Replay the calls of a records file in virtual time. First the setting that they had is simulated and held against what
happened; then, if that matches, other settings are: another policy, mapping, cap, number or size of engines. Nothing
is sent anywhere. What an engine takes is found in the records themselves.
"""

EXAMPLES = """\
A process writes its records where its configuration says (records_file = "records.jsonl" in orla.toml), or
Orla(records_file="records.jsonl"). Such a file holds lengths and keyed hashes of prompts, no text.

examples:
  orla-lg replay records.jsonl                          how near the simulation is to what happened
  orla-lg replay records.jsonl --policy all             each policy of docs/policies.md
  orla-lg replay records.jsonl --policy las --policy fcfs --plot policies.svg
  orla-lg replay records.jsonl --cap 4 --cap 8          at most so many calls at an engine at once
  orla-lg replay records.jsonl --engines 2              two engines like each one; a workflow stays with its own
  orla-lg replay records.jsonl --pool 200000            a KV cache of another size, in tokens
  orla-lg replay records.jsonl --speed 2                engines twice as fast
  orla-lg replay records.jsonl --mapping draft=light    a stage on another backend of the file
  orla-lg replay records.jsonl --admission off          calls do not wait until their cache fits
  orla-lg replay records.jsonl --policy las --cap 4 --together        one setting with both
  orla-lg replay records.jsonl --kv-tokens 46592        what the engine has, where nothing says so
  orla-lg replay trace.jsonl.gz --format mooncake --parameters engine.toml --policy all

Each value of each option is a setting of its own, unless --together is given. (+12%) is against the unchanged
setting, both simulated. A figure of the unchanged setting that is further from what happened than --tolerance is
marked with a cross: nothing is concluded of it; where makespan or mean run are off, nothing at all.

exit status: 0 done, 1 a fault, 2 the command is wrong, 3 the simulation does not match what happened, 130 stopped
"""

REFUSED, STOPPED = 3, 130
BAR = 24


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the top parser."""
    parser = subparsers.add_parser(
        "replay",
        help="recorded traffic in virtual time, as it was and under other settings",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("records", type=Path, metavar="RECORDS", help="the file, plain or .gz")
    add("--format", choices=public.FORMATS, default="records", help="what it is (default: our records)")
    add("--limit", type=_whole, metavar="N", help="only the first N calls")
    known = parser.add_argument_group("what was there, where the file does not say")
    known.add_argument("--config", type=Path, metavar="FILE", help="the orla.toml that the calls were served under")
    known.add_argument(
        "--kv-tokens", action="append", metavar="[BACKEND=]N", help="what the KV cache holds, in tokens"
    )
    known.add_argument("--parameters", action="append", metavar="[BACKEND=]FILE",
        help="the engine in numbers, by `orla-lg sim calibrate` (default: found in the records)")  # fmt: skip
    asked = parser.add_argument_group("what if")
    asked.add_argument("--policy", action="append", metavar="NAME|all", help=f"{', '.join(NAMES)}, or all of them")
    asked.add_argument(
        "--mapping", action="append", metavar="STAGE=BACKEND", help="a stage (or *) on another backend"
    )
    asked.add_argument("--cap", "--max-concurrency", dest="cap", action="append", type=_whole, metavar="N",
        help="at most so many calls at each engine at once")  # fmt: skip
    asked.add_argument(
        "--engines", action="append", type=_whole, metavar="N", help="so many engines for each backend"
    )
    asked.add_argument("--pool", action="append", type=_whole, metavar="N", help="a KV cache of N tokens")
    asked.add_argument("--speed", action="append", type=_positive, metavar="X", help="engines X times as fast")
    asked.add_argument("--memory", action="append", metavar="NAME", help="a policy of caches (docs/memory.md)")
    asked.add_argument("--admission", action="append", choices=("on", "off"), help="whether calls wait for room")
    asked.add_argument("--together", action="store_true", help="all of these in one setting")
    shown = parser.add_argument_group("what is shown")
    shown.add_argument("--plot", type=Path, metavar="FILE", help="also a picture, .svg, .png or .pdf (matplotlib)")
    shown.add_argument("--json", action="store_true", help="print JSON instead of tables")
    shown.add_argument("--tolerance", type=_positive, default=TOLERANCE, metavar="SHARE",
        help=f"so far a figure may be off, as a part of what happened ({TOLERANCE})")  # fmt: skip
    shown.add_argument("--anyway", action="store_true", help="compare even where the simulation does not match")
    shown.add_argument("--quiet", action="store_true", help="no progress on standard error")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, print, and return the exit status."""
    log = logging.getLogger("orla_lg")
    level = log.level
    log.setLevel(logging.ERROR)  # warnings of a core in virtual time concern no real one
    try:
        return _run(args)
    finally:
        log.setLevel(level)


def _run(args: argparse.Namespace) -> int:
    progress = ReplayProgress(show=not args.quiet and sys.stderr.isatty())
    whats = what_ifs(args)
    try:
        study = _study(args, progress)
        stopped = _compare(study, whats, progress)
    except KeyboardInterrupt:
        progress.end()
        print("orla-lg replay: stopped before the unchanged setting was simulated", file=sys.stderr)
        return STOPPED
    finally:
        progress.end()
    report = study.report
    print(json.dumps(report.asdict(), indent=2) if args.json else "\n".join(text(report)))
    if args.plot is not None and not stopped and (report.shows_others or not whats):
        draw(report, args.plot)
    if stopped:
        print(f"orla-lg replay: stopped; {len(report.others)} of {len(whats)} other settings were simulated",
              file=sys.stderr)  # fmt: skip
        return STOPPED
    return 0 if report.shows_others else REFUSED


def _study(args: argparse.Namespace, progress: ReplayProgress) -> Study:
    """Read the file, find the engines' numbers, and simulate the unchanged setting."""

    def lines(number: int) -> None:
        progress.tell(f"reading {args.records.name}: line {number:,}")

    if args.format == "records":
        seen = reading.read(args.records, args.limit, lines)
    else:
        seen = public.read(args.records, args.format, args.limit)
    study = Study(
        workload_of(seen), config=args.config, kv_tokens=_by_backend(args.kv_tokens, "--kv-tokens", _whole),
        parameters=_by_backend(args.parameters, "--parameters", Path), tolerance=args.tolerance, anyway=args.anyway,
    )  # fmt: skip
    study.check(what_ifs(args))
    study.begin(progress.of)
    return study


def _compare(study: Study, whats: Sequence[WhatIf], progress: ReplayProgress) -> bool:
    """Simulate the other settings; returns whether that was stopped. What was finished is in the report."""
    if not study.report.shows_others:
        return False
    try:
        for number, what in enumerate(whats):
            study.play(what, progress.of(f"{number + 1}/{len(whats)} {what.name}"))
    except KeyboardInterrupt:
        return True
    return False


class ReplayProgress:
    """A bar on standard error, where that is a terminal."""

    def __init__(self, *, show: bool) -> None:
        self._show, self._at_s, self._wide = show, 0.0, 0

    def tell(self, said: str) -> None:
        """Show a line in the place of the one before; not more often than an eye follows."""
        if self._show and (now := time.monotonic()) > self._at_s + 0.1:
            self._at_s = now
            print(f"\r{said:<{self._wide}}", end="", file=sys.stderr, flush=True)
            self._wide = len(said)

    def of(self, what: str) -> Callable[[int, int], None]:
        """Return what shows how much of something is done, given how much of how much."""

        def show(done: int, total: int) -> None:
            full = BAR * done // max(1, total)
            self.tell(f"{'█' * full}{'·' * (BAR - full)} {done:,}/{total:,} calls, {what}")

        return show

    def end(self) -> None:
        """Take the line away."""
        if self._wide:
            print(f"\r{'':<{self._wide}}\r", end="", file=sys.stderr, flush=True)
            self._wide = 0


def _by_backend(given: Sequence[str] | None, option: str, of: Callable[[str], object]) -> dict[str, object]:
    """Return values by backend; ``*`` is any."""
    found: dict[str, object] = {}
    for each in given or ():
        name, equals, value = each.rpartition("=")
        try:
            found[name if equals else "*"] = of(value)
        except (ValueError, argparse.ArgumentTypeError) as error:
            raise ConfigError(f"{option} {each}: {error}") from error
    return found


def _whole(said: str) -> int:
    try:
        value = int(said.replace(",", "").replace("_", ""))
    except ValueError:
        value = 0
    if not 1 <= value <= 1_000_000_000:
        raise argparse.ArgumentTypeError(f"{said!r} is no whole number from 1 to 1,000,000,000")
    return value


def _positive(said: str) -> float:
    try:
        value = float(said)
    except ValueError:
        value = 0.0
    if not 0.0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{said!r} is no number above 0")
    return value
