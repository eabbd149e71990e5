"""How a benchmark speaks: its command line, how far it is, what it found and where that goes, and its early end."""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from openai import OpenAIError

from bench.lib.flags import count
from orla_lg.errors import OrlaError

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
END = "<!-- end of figures -->"
WIDTH = 100
"""Of the line; a shorter text covers a longer one before it."""
BAR = 20


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


def begin(name: str) -> str:
    """Return the line that stands before the figures of a benchmark, such as ``cache: vllm``."""
    return f"<!-- figures of bench/{name} -->"


def put(page: Path, name: str, lines: Sequence[str]) -> None:
    """Put *lines* where *page* keeps the figures of *name*; all else of it stays."""
    made = "\n".join([begin(name), "", *lines, "", END])
    text = page.read_text(encoding="utf-8")
    changed, found = re.subn(f"{re.escape(begin(name))}.*?{END}", lambda _: made, text, flags=re.S)
    if not found:
        raise SystemExit(f"{page} has no place for the figures of {name}: no line {begin(name)}")
    page.write_text(changed, encoding="utf-8")


def tell(text: str, *, last: bool = False) -> None:
    """Write on standard error how far it is; after the *last* text another line begins."""
    if sys.stderr.isatty():
        print(f"\r{text:<{WIDTH}}", end="\n" if last else "", file=sys.stderr, flush=True)
    else:
        print(text, file=sys.stderr, flush=True)


def bar(text: str, total: int) -> Callable[[], None]:
    """Show a bar; each call of what it returns moves it by one of *total*. Elsewhere than on a terminal it stands."""
    begin_s, done = time.monotonic(), 0

    def show() -> None:
        full = BAR * min(done, total) // total
        tell(f"{text:<58} {'█' * full}{'·' * (BAR - full)} {time.monotonic() - begin_s:4.0f} s")

    def tick() -> None:
        nonlocal done
        done += 1
        if sys.stderr.isatty():
            show()

    show()
    return tick
