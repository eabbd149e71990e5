"""Kill and freeze what serves several machines, under load: no call lost, none doubled, none above the bound.

    make test-scale-faults                       more than 200 faults, half an hour; run it alone
    make test-scale-faults FAULTS=one            one of each kind, and two controls (nine minutes)
    make test-scale-faults FAULTS=few            a core, a standby, a replica and Redis, and a control (two minutes)
    make test-scale-faults FAULTS='--only Redis' the kinds with this in their names
    make test-scale-faults FAULTS=--write        puts the table into docs/failover.md, too

Processes, on one machine: a core and its standby, replicas of wrapped LangGraph graphs, two scripted engines that
count, and Redis, in a network, pids and temporary files of their own where these may be made. With each kind goes a
control with one part spoilt, which must break the bound: else the other runs prove nothing.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from random import Random

from bench.lib.command import DOCS, bar, put, tell
from tests.scale_faults import sandbox
from tests.scale_faults.account import Row, shown
from tests.scale_faults.kinds import CONTROLS, FIRST, KINDS, SOME, Kind
from tests.scale_faults.site import BOUNDS, MAIN, Site, Watch, has_redis

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
    add("--replicas", type=int, default=4)
    add("--seed", default="")
    add("--write", action="store_true", help=f"put the table into {PAGE.name}")
    add("--keep", type=Path, metavar="FOLDER", help="where the processes' logs stay")
    args = parser.parse_args(words)
    args.one |= args.few
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


def made(site: Site, name: str, kind: Kind, times: int, seed: str) -> Row:
    """Make a kind of fault some times, and return what happened."""
    dice, tick = Random(f"{name}{seed}"), bar(name, times)
    site.cores_are(apart=kind.apart)
    site.calls_take(kind.long_s)
    watch = Watch(site, name, kind.may_end_with)
    for _ in range(times):
        watch.fault(kind.make, dice)
        tick()
    return watch.row()


def run(args: argparse.Namespace, folder: Path, *, apart: bool) -> int:
    rows, controls, wrong = list[Row](), list[Row](), list[str]()
    began_s = time.monotonic()
    with Site(folder, replicas=3 if args.one else args.replicas, on_redis=args.store == "redis", apart=apart) as site:
        for name, kind in chosen(KINDS, args, SOME if args.few else ()):
            row = made(site, name, kind, 1 if args.one else max(1, round(kind.times * args.times)), args.seed)
            rows.append(row)
            wrong += row.wrong(BOUNDS)
            tell(" | ".join(row.shown(BOUNDS)), last=True)
        for name, kind in () if args.no_controls else chosen(CONTROLS, args, FIRST[:1] if args.few else FIRST):
            row = made(site, name, kind, 1 if args.one else kind.times, args.seed)
            controls.append(row)
            if row.most[MAIN] <= BOUNDS[MAIN]:
                wrong.append(f"{name}: the bound held, so the other runs prove nothing")
            tell(" | ".join(row.shown(BOUNDS)), last=True)
        site.end()
    faults = sum(row.faults for row in rows)
    print("\n".join(shown([*rows, *controls], BOUNDS)))
    print(f"\n{faults} faults on {args.store} in {time.monotonic() - began_s:.0f} s")
    if args.write and not wrong:
        put(PAGE, FIGURES, [*shown([*rows, *controls], BOUNDS), "", f"{faults} faults, by `make test-scale-faults`."])
    print("\n".join(wrong) or "no call lost, none doubled, none above the bound")
    return 1 if wrong else 0


def main(words: Sequence[str]) -> int:
    args = parsed(words)
    if why := sandbox.enter("tests.scale_faults", words):
        tell(f"without a network and pids of its own: {why}", last=True)
    apart = not why
    try:
        if args.keep is not None:
            args.keep.mkdir(parents=True, exist_ok=True)
            return run(args, args.keep, apart=apart)
        with tempfile.TemporaryDirectory() as folder:
            return run(args, Path(folder), apart=apart)
    except KeyboardInterrupt:
        print("\nstopped; nothing of it is left", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
