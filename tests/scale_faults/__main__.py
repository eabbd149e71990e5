"""Kill and freeze what serves several machines, under load: no call lost, none doubled, none above the bound.

    make test-scale-faults                       more than 200 faults, 26 minutes; run it alone
    make test-scale-faults FAULTS=one            one of each kind, and two controls (six minutes)
    make test-scale-faults FAULTS=few            of six kinds one, and a control (two minutes)
    make test-scale-faults FAULTS='--only Redis' the kinds with this in their names
    make test-scale-faults FAULTS=--write        puts the table, and what was wrong, into docs/failover.md

A site is, on one machine, a core and its standby, replicas of wrapped LangGraph graphs, two gateways with plain HTTP
clients where a kind is of these, two scripted engines that count, and Redis; all sites are in a network, pids and
temporary files of their own where these may be made. Two sites run at once, in a core each. What stalls is a wrong
row, told with what the site was at, and the run goes on with a fresh site; Ctrl-C ends it with the rows until then.
With each kind goes a control with one part spoilt, which must break the bound: else the other runs prove nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from bench.lib.command import DOCS, bar, put, tell
from tests.scale_faults import sandbox
from tests.scale_faults.account import shown
from tests.scale_faults.controls import CONTROLS, FIRST
from tests.scale_faults.kinds import KINDS, SOME, Kind
from tests.scale_faults.running import Found, Run, Work
from tests.scale_faults.site import BOUNDS, Site, has_redis

FIGURES = "scale_faults"
PAGE = DOCS / "failover.md"


def parsed(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        "python -m tests.scale_faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--one", action="store_true", help="one fault of each kind, and two controls")
    add("--few", action="store_true", help="one fault of each of some kinds, and a control")
    add("--only", metavar="TEXT", default="", help="the kinds, and the controls, with this in their names")
    add("--no-controls", action="store_true")
    add("--times", type=float, default=1.0, metavar="X", help="so many times as many faults of each kind")
    add("--store", choices=("redis", "sqlite"), default="redis" if has_redis() else "sqlite")
    add("--sites", type=int, default=2, metavar="N", help="so many at once, each of which wants a CPU core")
    add("--replicas", type=int, default=4, help="of each site")
    add("--seed", default="")
    add("--write", action="store_true", help=f"put the table into {PAGE.name}")
    add("--keep", type=Path, metavar="FOLDER", help="where the processes' logs stay")
    args = parser.parse_args(words)
    args.one |= args.few
    if args.keep is not None:
        args.keep = args.keep.resolve()
        if args.keep.is_relative_to(Path(tempfile.gettempdir()).resolve()):
            parser.error(f"--keep: temporary files end with the run; name a folder outside {tempfile.gettempdir()}")
    return args


def chosen(
    kinds: Mapping[str, Kind], args: argparse.Namespace, few: Sequence[str] = ()
) -> Iterator[tuple[str, Kind]]:
    """Yield the kinds to make; *few* are those of a short run, where it does not make all."""
    for name, kind in kinds.items():
        if kind.needs_redis and args.store != "redis":
            continue
        if args.only.lower() in name.lower() and (not args.one or not few or name in few or args.only):
            yield name, kind


def works(args: argparse.Namespace) -> list[Work]:
    """Return what is to be made."""
    found = [
        Work(name, kind, 1 if args.one else max(1, round(kind.times * args.times)), args.seed)
        for name, kind in chosen(KINDS, args, SOME if args.few else ())
    ]
    if not args.no_controls:
        found += [
            Work(name, kind, kind.times, args.seed, is_control=True)
            for name, kind in chosen(CONTROLS, args, FIRST[:1] if args.few else FIRST)
        ]
    return found


def run(args: argparse.Namespace, folder: Path, *, apart: bool) -> int:
    began_s, planned = time.monotonic(), works(args)

    def opened(number: int, times: int) -> Site:
        where = folder / f"site-{number}-{times}"
        return Site(where, replicas=args.replicas, on_redis=args.store == "redis", apart=apart)

    def came(found: Found) -> None:
        tell(f"{time.monotonic() - began_s:5.0f} s | {' | '.join(found.row.shown(BOUNDS))}", last=True)
        for each in (*found.row.stalls, *found.wrong()):
            tell(f"WRONG: {each}", last=True)

    tick = bar(
        f"faults on {args.store}, at {args.sites} sites at once",
        sum(1 if work.is_control else work.times for work in planned),
    )
    making = Run(planned, args.sites, opened, tick, came)
    is_whole = making.run()
    founds = [making.found[work.name] for work in planned if work.name in making.found]
    lines = shown([found.row for found in founds], BOUNDS)
    faults = sum(found.row.faults for found in founds if not found.work.is_control)
    wrong = [each for found in founds for each in found.wrong()]
    print("\n".join(lines))
    print(f"\n{faults} faults on {args.store} in {time.monotonic() - began_s:.0f} s")
    if args.write and is_whole:
        list_of = ["", "What was wrong:", "", *(f"* {each}" for each in wrong)] if wrong else []
        put(PAGE, FIGURES, [*lines, "", f"{faults} faults, by `make test-scale-faults`.", *list_of])
    print("\n".join(wrong) or "no call lost, none doubled, none above the bound")
    if not is_whole:
        print(f"\nstopped after {len(founds)} of {len(planned)} kinds; nothing of it is left", file=sys.stderr)
        return 130
    return 1 if wrong else 0


def main(words: Sequence[str]) -> int:
    args = parsed(words)
    if why := sandbox.enter("tests.scale_faults", words):
        tell(f"without a network and pids of its own: {why}", last=True)
    if args.keep is not None:
        args.keep.mkdir(parents=True, exist_ok=True)
        return run(args, args.keep, apart=not why)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        return run(args, Path(folder), apart=not why)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
