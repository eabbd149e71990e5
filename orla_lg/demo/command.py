"""``orla-lg demo``: its options, and whether it is watched live, in lines, or kept as a picture."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from orla_lg.errors import ConfigError, OrlaError

if TYPE_CHECKING:
    from orla_lg.demo.board import Board, Line
    from orla_lg.demo.run import DemoResult, Plan
    from orla_lg.demo.view import Picture
    from orla_lg.orla import Orla

INTERRUPTED = 130
DEFAULT_TICKETS = 12

DESCRIPTION = """\
A customer support desk, written as a plain LangGraph graph and served by orla_lg:

    classify ─┬─ policy_check ─┬─ reply
              └─ route_ticket ─┘

Without --url, two small engines are started in this process, "light" for classify and "heavy" for
the rest: no key, no GPU, no container. Many tickets at once show what orla_lg does: queues per
backend and stage, billing and technical tickets first, caches kept from policy_check to reply,
flushed at the switch from light to heavy and when a ticket is answered.
"""

EXAMPLES = """\
examples:
  orla-lg demo                                   12 tickets on the embedded engines, about a minute
  orla-lg demo -n 20                             more tickets, longer queues
  orla-lg demo --ticket "My lamp does not work"  one ticket of your own, and the letter it gets
  orla-lg demo --url http://127.0.0.1:8000/v1 --model Qwen/Qwen3-4B
                                                 the same on an engine of your own
"""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add ``demo`` to the command line."""
    parser = subparsers.add_parser(
        "demo",
        help="answer support tickets with a LangGraph graph, and watch orla_lg serve it",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--ticket", type=_ticket, metavar="TEXT", help="answer this one ticket and print the letter")
    many = "answer N of the tickets that come with the demo, all at once (default: %(default)s)"
    which.add_argument("-n", "--tickets", type=_count, default=DEFAULT_TICKETS, metavar="N", help=many)
    parser.add_argument("--seed", type=int, metavar="N", help="shuffle these tickets; the same N, the same order")
    engine = parser.add_argument_group("engine")
    engine.add_argument("--url", help="an OpenAI-compatible engine that runs already, ending in /v1")
    engine.add_argument("--model", help="the model to ask it for (default: the first that it serves)")
    engine.add_argument("--engine", help="its kind: llamacpp, openai, ... (default: found out by asking)")
    engine.add_argument("--api-key-env", metavar="NAME", help="the environment variable that holds its API key")
    shown = parser.add_argument_group("output")
    kept = "where the letters are written, one line of JSON each (default: %(default)s)"
    shown.add_argument("--outbox", type=Path, default=Path("outbox.jsonl"), metavar="FILE", help=kept)
    shown.add_argument("--plain", action="store_true", help="lines instead of the live view, as into a pipe")
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


def main(args: argparse.Namespace) -> int:
    """Run the demo; 0 when every ticket was answered, 130 after Ctrl-C."""
    from orla_lg.demo.run import run

    try:
        plan = _plan(args)
        screen = _screen(args)
        outcome = run(plan, screen.watch)
    except OrlaError as error:
        print(f"orla-lg demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while an engine was still starting
        return INTERRUPTED
    screen.conclude(outcome, plan.outbox, single=args.ticket is not None)
    if outcome.interrupted:
        return INTERRUPTED
    return 0 if outcome.board.done == outcome.board.tickets else 1


def _screen(args: argparse.Namespace) -> _Lines | _Screen | _WithPicture:
    shown = _Screen() if _rich() and sys.stdout.isatty() and not args.plain else _Lines()
    if args.save_svg is None:
        return shown
    if not _rich():
        raise ConfigError("--save-svg draws with rich, which is not installed: pip install 'orla-lg[demo]'")
    return _WithPicture(shown, args.save_svg)


def _plan(args: argparse.Namespace) -> Plan:
    from orla_lg.demo.run import Plan
    from orla_lg.demo.tickets import pick

    letters = [args.ticket] if args.ticket is not None else pick(args.tickets, args.seed)
    return Plan(letters, args.outbox, args.url, args.model, args.engine, _api_key(args.api_key_env))


def _api_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    if variable not in os.environ:
        raise ConfigError(f"--api-key-env names {variable}, which is not set in this environment")
    return os.environ[variable]


def _rich() -> bool:
    return importlib.util.find_spec("rich") is not None


class _Lines:
    """Plain output: a line for everything that happens, a table of text at the end."""

    @contextmanager
    def watch(self, board: Board, orla: Orla) -> Iterator[None]:
        """Print what happens while the block runs."""
        board.sink = self._print
        yield

    def _print(self, line: Line) -> None:
        ticket = f"#{line.ticket:02}" if line.ticket is not None else ""
        print(f"{line.at_s:6.1f} s  {ticket:<3}  {line.stage:<12}  {line.text}", flush=True)

    def conclude(self, outcome: DemoResult, outbox: Path, *, single: bool) -> None:
        """Print the report."""
        from orla_lg.demo.report import as_text

        print()
        if single and (email := outcome.emails.get(1)):
            print(f"Subject: {email.subject}\n\n{email.body}\n")
        print(as_text(outcome.board, outbox))


class _Screen:
    """The live view and a table, with rich."""

    def __init__(self) -> None:
        from rich.console import Console

        self.console = Console()

    def watch(self, board: Board, orla: Orla) -> AbstractContextManager[None]:
        """Show the live view while the block runs."""
        from orla_lg.demo.view import live

        return live(board, orla.statistics, self.console)

    def conclude(self, outcome: DemoResult, outbox: Path, *, single: bool) -> None:
        """Show the report."""
        from orla_lg.demo.view import letter_panel, summary

        self.console.print()
        if single and (email := outcome.emails.get(1)):
            self.console.print(letter_panel(email.subject, email.body))
        self.console.print(summary(outcome.board, outbox))


class _WithPicture:
    """A screen, and a picture of the run besides."""

    def __init__(self, screen: _Lines | _Screen, path: Path) -> None:
        self._screen, self._path = screen, path
        self._picture: Picture | None = None

    @contextmanager
    def watch(self, board: Board, orla: Orla) -> Iterator[None]:
        """Let the screen watch, and the picture listen."""
        from orla_lg.demo.view import Picture

        self._picture = Picture(board, orla.statistics)
        orla.subscribe(self._picture.hear)
        with self._screen.watch(board, orla):
            yield

    def conclude(self, outcome: DemoResult, outbox: Path, *, single: bool) -> None:
        """Let the screen conclude, and write the picture."""
        self._screen.conclude(outcome, outbox, single=single)
        if self._picture is not None:
            self._picture.save(self._path, outbox)
            print(f"picture    {self._path}")
