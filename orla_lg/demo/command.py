"""``orla-lg demo``: its options, and how it is shown: live, in lines, as a picture."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from orla_lg.errors import ConfigError, OrlaError

if TYPE_CHECKING:
    from orla_lg.core.operation.statistics import Statistics
    from orla_lg.demo.board import Board, Line
    from orla_lg.demo.run import DemoResult, Plan

INTERRUPTED = 130
DEFAULT_TICKETS = 5

DESCRIPTION = """\
A customer support desk, written as a plain LangGraph graph:

    classify ─┬─ policy_check ─┬─ reply
              └─ route_ticket ─┘

More tickets come at once than the engine has places in its cache. They are answered twice: bare, by the graph as it
is, and wrapped in orla_lg. The end says what that changed: first token, whole time, prompt tokens computed again.
Without --url, two small engines are started in this process for each arm, "light" for classify and "heavy" for the
rest: no key, no GPU, no container.
"""

EXAMPLES = """\
examples:
  orla-lg demo --ticket "My lamp does not work"  one ticket of your own, the letter it gets, and its calls drawn
  orla-lg demo                                   bare against wrapped; a minute and a half on two cores
  orla-lg demo --details                         the same, with what was saved, restored, flushed and replaced
  orla-lg demo --arms wrapped,bare               the other order, for skeptics
  orla-lg demo --url http://127.0.0.1:8000/v1 --model Qwen/Qwen3-4B
                                                 the same on an engine of your own

exit status: 0 every ticket was answered, 1 not every one, 130 after Ctrl-C
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="answer support tickets with a LangGraph graph, bare and wrapped: what does orla_lg change?",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ticket", type=_ticket, metavar="TEXT", help="answer this one ticket and print the letter")
    many = "answer N of the tickets that come with the demo, all at once (default: %(default)s)"
    which.add_argument("-n", "--tickets", type=_count, default=DEFAULT_TICKETS, metavar="N", help=many)
    parser.add_argument("--seed", type=int, metavar="N", help="shuffle these tickets; the same N, the same order")
    arms = "which arms are run, in this order (default: bare,wrapped; with --ticket: wrapped)"
    parser.add_argument("--arms", type=_arms, metavar="ARM,ARM", help=arms)
    engine = parser.add_argument_group("engine")
    engine.add_argument("--url", help="an OpenAI-compatible engine that runs already, ending in /v1")
    engine.add_argument("--model", help="the model to ask it for (default: the first that it serves)")
    engine.add_argument("--engine", help="its kind: llamacpp, openai, ... (default: found out by asking)")
    engine.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds its API key")
    shown = parser.add_argument_group("output")
    shown.add_argument("--details", action="store_true", help="also what each arm's caches, tools and stages did")
    shown.add_argument("--plain", action="store_true", help="lines instead of the live view, as into a pipe")
    kept = "write the letters there, one line of JSON each (default: they are kept nowhere)"
    shown.add_argument("--outbox", type=Path, metavar="FILE", help=kept)
    written = "write the records of the wrapped arm there, for orla-lg explain"
    shown.add_argument("--records", type=Path, metavar="FILE", help=written)
    shown.add_argument("--save-svg", type=Path, metavar="FILE", help="also write a picture of the run")
    parser.set_defaults(run=main)


def _ticket(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("the ticket is empty; say what is wrong, in a sentence")
    return text


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of tickets; it must be 1 or more")
    return int(text)


def _arms(text: str) -> tuple[str, ...]:
    from orla_lg.demo.compare import ARMS

    named = tuple(part.strip() for part in text.split(","))
    if unknown := [name for name in named if name not in ARMS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is no arm; there are {' and '.join(ARMS)}")
    if len(set(named)) < len(named):
        raise argparse.ArgumentTypeError(f"{text!r} names an arm twice")
    return named


def main(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every ticket was answered, 130 after Ctrl-C."""
    try:
        from orla_lg.demo.run import run  # takes a second or two, in which Ctrl-C may come

        plan = _plan(args)
        screen = _screen(args)
        screen.announce(plan)
        outcome = run(plan, screen.watch)
    except OrlaError as error:
        print(f"orla-lg demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while an engine was still starting
        return INTERRUPTED
    screen.conclude(outcome, plan)
    if outcome.interrupted:
        return INTERRUPTED
    return 0 if outcome.complete else 1


def _screen(args: argparse.Namespace) -> Screen:
    bright = _rich() and sys.stdout.isatty() and not args.plain
    if args.save_svg is not None and not _rich():
        raise ConfigError("--save-svg draws with rich, which is not installed: pip install 'orla-lg[demo]'")
    return Screen(bright=bright, single=args.ticket is not None, details=args.details, picture=args.save_svg)


def _plan(args: argparse.Namespace) -> Plan:
    from orla_lg.demo.compare import ARMS, WRAPPED
    from orla_lg.demo.run import Plan
    from orla_lg.demo.tickets import pick

    single = args.ticket is not None
    letters = [args.ticket] if single else pick(args.tickets, args.seed)
    arms = args.arms or ((WRAPPED,) if single else ARMS)
    key = _api_key(args.api_key_env)
    return Plan(
        letters, args.outbox, args.url, args.model, args.engine, key, arms, files=not single, records=args.records
    )


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if variable not in os.environ:
        raise ConfigError(f"--api-key-env names {variable}, which is not set in this environment")
    return os.environ[variable]


def _rich() -> bool:
    return importlib.util.find_spec("rich") is not None


class Screen:
    """What the demo shows: a live view or lines while it runs, and how it ended.

    Args:
        bright: Whether there is a terminal for the live view.
        single: Whether there is one ticket, so that its letter is shown.
        details: Whether what goes on inside is shown, too.
        picture: Where a picture of the run is written.
    """

    def __init__(self, *, bright: bool, single: bool, details: bool, picture: Path | None) -> None:
        self._bright, self._single, self._details, self._path = bright, single, details, picture
        self._picture: Any = None
        if picture is not None:
            from orla_lg.demo.view import Picture

            self._picture = Picture()

    def announce(self, plan: Plan) -> None:
        """Say what is about to be run."""
        from orla_lg.demo.conclusion import engines, load

        turns = f": {', then '.join(plan.arms)}" if len(plan.arms) > 1 else ""
        print(f"{load(plan)}{turns}\non {engines(plan)}", flush=True)

    @contextmanager
    def watch(self, board: Board, statistics: Callable[[], Statistics] | None) -> Iterator[None]:
        """Show what happens while the block runs; nothing of the live view stays."""
        with ExitStack() as stack:
            if self._bright:
                from rich.console import Console

                from orla_lg.demo.view import live

                stack.enter_context(live(board, statistics, Console()))
            else:
                board.sink = partial(self._print, board)
            if self._picture is not None and statistics is not None:
                stack.enter_context(self._picture.watch(board, statistics))
            yield

    def _print(self, board: Board, line: Line) -> None:
        ticket = f"#{line.ticket:02}" if line.ticket is not None else ""
        if self._details or line.kind == "error":
            print(f"{line.at_s:6.1f} s  {ticket:<3}  {line.stage:<12}  {line.text}", flush=True)
        elif line.kind == "end":
            arm = f"{board.arm}: " if board.arm else ""
            print(f"{line.at_s:6.1f} s  {arm}{board.done} of {board.tickets} answered", flush=True)

    def conclude(self, outcome: DemoResult, plan: Plan) -> None:
        """Show how it ended, and write the picture."""
        from orla_lg import timeline
        from orla_lg.demo import conclusion

        print()
        if self._single:
            if email := outcome.emails.get(1):
                self._letter(email.subject, email.body)
            lines = conclusion.of_one(outcome, plan, width=timeline.columns(), details=self._details)
        else:
            lines = conclusion.of_many(outcome, plan, details=self._details)
        print(timeline.for_stream(lines, sys.stdout))
        if self._path is not None:
            self._picture.save(self._path, lines)
            print(f"{'picture':<10} {self._path}")

    def _letter(self, subject: str, body: str) -> None:
        if self._bright:
            from rich.console import Console

            from orla_lg.demo.view import letter_panel

            Console().print(letter_panel(subject, body))
        else:
            print(f"Subject: {subject}\n\n{body}")
        print()
