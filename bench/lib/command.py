"""The command line of a benchmark, what it tells in the end, and its end if it cannot go on: with all kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from openai import OpenAIError

from bench.lib.flags import count
from bench.lib.marks import put
from orla_lg.errors import OrlaError


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``bench/<name>``, whose module's docstring is the help."""
    return argparse.ArgumentParser(
        f"python -m bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def usual(
    options: argparse.ArgumentParser, *, rounds: int | None = None, keep: str | None = None, writes: str = ""
) -> None:
    """Add the options that most benchmarks have."""
    add = options.add_argument
    if rounds is not None:
        what = f"so many loads, each through all arms ({rounds})"
        add("--rounds", type=count, default=rounds, metavar="N", help=what)
    if keep is not None:
        add("--keep", type=Path, default=Path(keep) if keep else None, metavar="FILE",
            help=f"where turns are kept, to go on from ({keep or 'nowhere'})")  # fmt: skip
    if writes:
        add("--write", action="store_true", help=f"write {writes}")


def finish(lines: Sequence[str], name: str, page: Path | None, drawn: Sequence[str] = ()) -> int:
    """Print what was found; where there is a *page*, put it there as the figures of *name*, with what is drawn."""
    print("\n".join(lines))
    if page is not None:
        put(page, name, [*lines, *drawn])
    return 0


def ended(main: Callable[[], int], stopped: str) -> int | str:
    """Return a benchmark's exit status, or in a line why there is none."""
    fault = ""
    try:
        return main()
    except* KeyboardInterrupt:
        fault = f"\nstopped; {stopped}"
    except* (OpenAIError, OrlaError) as failed:
        fault = f"\na call failed: {failed.exceptions[0]}"
    return fault
