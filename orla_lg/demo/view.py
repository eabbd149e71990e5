"""The live view: the graph with its stages lighting up, who waits where, and what happened last."""

from __future__ import annotations

import io
import itertools
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from orla_lg import timeline
from orla_lg.core.operation.statistics import Statistics
from orla_lg.demo.board import STAGES, Board, Line, StageState

FRAMES_PER_S = 8
GRAPH_ROWS = 11
FIXED_ROWS = GRAPH_ROWS + 7
"""What is always there: title, graph, one line per backend, progress, and the space between them."""

_MARKS = {"queue": "…", "done": "✓", "tool": "⚒", "fact": "●", "end": "■", "error": "✗"}
_STYLES = {
    "queue": "yellow", "done": "green", "tool": "magenta", "fact": "bright_blue", "end": "dim", "error": "bold red",
}  # fmt: skip
_URGENT, _CALM = "bold black on bright_yellow", "bold black on bright_cyan"


# The graph


class Canvas:
    """A grid of characters with styles, to draw boxes and lines on."""

    def __init__(self, width: int, height: int) -> None:
        self._cells = [[(" ", "")] * width for _ in range(height)]

    def put(self, row: int, column: int, text: str, style: str = "") -> None:
        """Write *text* from a place on."""
        for offset, char in enumerate(text):
            if 0 <= column + offset < len(self._cells[row]):
                self._cells[row][column + offset] = (char, style)

    def box(self, row: int, column: int, width: int, title: str, lines: list[tuple[str, str]], style: str) -> None:
        """Draw a box with a title in its upper edge and *lines* of text and style in it."""
        heading = f"╭─ {title} "
        self.put(row, column, heading + "─" * (width - len(heading) - 1) + "╮", style)
        for offset, (text, text_style) in enumerate(lines, start=1):
            self.put(row + offset, column, "│" + " " * (width - 2) + "│", style)
            self.put(row + offset, column + 2, text[: width - 4], text_style)
        self.put(row + len(lines) + 1, column, "╰" + "─" * (width - 2) + "╯", style)

    def text(self) -> Text:
        """Return the drawing."""
        drawn = Text(no_wrap=True, overflow="crop")
        for row in self._cells:
            for style, cells in itertools.groupby(row, key=lambda cell: cell[1]):
                drawn.append("".join(char for char, _ in cells), style or None)
            drawn.append("\n")
        drawn.right_crop(1)
        return drawn


def graph_drawing(board: Board, width: int) -> Text:
    """Draw ``classify``, the two parallel stages and ``reply`` with what goes on in them."""
    gap = 7 if width >= 100 else 5
    each = min(34, (width - 2 * gap) // 3)
    canvas = Canvas(3 * each + 2 * gap, GRAPH_ROWS)
    places = {"classify": (3, 0), "policy_check": (0, 1), "route_ticket": (6, 1), "reply": (3, 2)}
    for name, (row, nth) in places.items():
        state = board.stages[name]
        style = _box_style(state, board.tickets)
        canvas.box(row, nth * (each + gap), each, name, _box_lines(state, board.tickets, each - 4), style)
    _edges(canvas, each, gap, board)
    return canvas.text()


def _box_style(state: StageState, tickets: int) -> str:
    if state.running or state.inside > len(state.waiting):
        return "bold bright_cyan"
    if state.waiting:
        return "yellow"
    return "green" if state.left >= tickets else "bright_black"


def _box_lines(state: StageState, tickets: int, width: int) -> list[tuple[str, str]]:
    busy = f"{len(state.running)} running · {len(state.waiting)} waiting"
    if len(busy) > width:
        busy = f"{len(state.running)} run · {len(state.waiting)} wait"
    filled = round(state.left / max(1, tickets) * (width - 6))
    bar = "━" * filled + "╌" * (width - 6 - filled) + f" {state.left:>2}/{tickets}"
    backends = "+".join(sorted({record.backend or "?" for record in state.records}))
    first = [record.ttft_s for record in state.records if record.ttft_s is not None]
    last = f"{backends} · ttft {first[-1]:.2f} s" if first else backends
    busy_style = "bold" if state.running else "yellow" if state.waiting else "bright_black"
    return [(busy, busy_style), (bar, "green"), (last, "bright_black")]


def _edges(canvas: Canvas, each: int, gap: int, board: Board) -> None:
    """Draw the fork after ``classify`` and the join before ``reply``; an edge is lit once a ticket passed it."""
    fork, join = each + gap // 2, 2 * each + gap + gap // 2
    lit = {name: "cyan" if board.stages[name].left else "bright_black" for name in board.stages}
    after, before = lit["classify"], "cyan" if board.stages["reply"].inside else lit["reply"]
    canvas.put(5, each, "─" * (gap // 2) + "┤", after)
    canvas.put(5, join, "├" + "─" * (gap - gap // 2 - 2) + "▶", before)
    for row, corners in ((2, "╭╮"), (8, "╰╯")):
        canvas.put(row, fork, corners[0] + "─" * (gap - gap // 2 - 2) + "▶", after)
        canvas.put(row, 2 * each + gap, "─" * (gap // 2) + corners[1], before)
    for row in (3, 4, 6, 7):
        canvas.put(row, fork, "│", after)
        canvas.put(row, join, "│", before)


# Who is where, and what happened


def backend_line(board: Board, name: str) -> Text:
    """Return a backend's slots with the tickets in them, and its queue."""
    state = board.backends.get(name)
    running = list(state.running.values()) if state else []
    waiting = list(state.waiting.values()) if state else []
    known = board.statistics.backends.get(name) if board.statistics else None
    slots = (known.memory.slots if known else None) or len(running)
    line = Text(f"{name:<7}", style="bold", no_wrap=True, overflow="ellipsis")
    for nth in range(max(slots, len(running))):
        line.append(" ")
        line.append(*_cell(board, running[nth]) if nth < len(running) else ("  ·  ", "bright_black"))
    if known is not None and known.memory.slots:
        line.append(f"  {known.memory.slots_held} slots held", "bright_black")
    line.append(f"  {len(waiting)} waiting ", "yellow" if waiting else "bright_black")
    for number in sorted(waiting, key=lambda number: number not in board.urgent):
        line.append(f" {number:02}", "bright_yellow" if number in board.urgent else "cyan")
    return line


def _cell(board: Board, number: int) -> tuple[str, str]:
    return f" #{number:02} ", _URGENT if number in board.urgent else _CALM


def line_text(line: Line) -> Text:
    """Return a line of the log."""
    text = Text(f"{line.at_s:6.1f} s  ", style="bright_black", no_wrap=True, overflow="ellipsis")
    text.append(f"#{line.ticket:02} " if line.ticket is not None else "    ", "bold")
    text.append(f"{line.stage:<12} ", "cyan")
    style = _STYLES.get(line.kind, "")
    text.append(f"{_MARKS.get(line.kind, ' ')} {line.text}", style)
    return text


def progress_line(board: Board, width: int) -> Text:
    """Return how many tickets are answered, and what the caches saved."""
    prompt = sum(record.prompt_tokens or 0 for record in board.records())
    cached = sum(record.cached_tokens or 0 for record in board.records())
    share = f"{100 * cached / prompt:.0f} % of prompts cached" if prompt else ""
    said = f" {board.done}/{board.tickets} answered   {share}"
    room = max(4, width - len(said) - 1)
    steps = sum(stage.left for stage in board.stages.values())
    filled = min(room, round(room * steps / max(1, board.tickets * len(STAGES))))
    text = Text("█" * filled, style="green", no_wrap=True)
    text.append("░" * (room - filled), "bright_black")
    return text.append(said, "bold")


def frame(board: Board, width: int, height: int) -> RenderableType:
    """Return the whole view at this moment, for a terminal of that size."""
    with board.lock:
        width = min(width, 124)
        title = Text("orla-lg demo", style="bold", no_wrap=True, overflow="ellipsis")
        if board.arm:
            title.append(f"  {board.arm}", "bold bright_cyan")
        tickets = f"{board.tickets} ticket{'s' * (board.tickets != 1)}"
        title.append(f"  {tickets}   {board.now_s - board.started_s:5.1f} s   ", "bright_black")
        if board.queues:
            title.append(" billing, technical: go first ", _URGENT)
            title.append(" ")
            title.append(" others ", _CALM)
        names = list(board.statistics.backends) if board.statistics else list(board.backends)
        room = max(2, height - FIXED_ROWS - len(names))
        log = [line_text(line) for line in list(board.lines)[-room:]]
        log += [Text("")] * (room - len(log))
        backends = [backend_line(board, name) for name in names]
        blank = Text("")
        parts = [title, blank, graph_drawing(board, width), blank, *backends, blank, *log, blank]
        return Group(*parts, progress_line(board, width))


# On a screen


class _Frame:
    """Draws the board anew whenever the terminal is refreshed."""

    def __init__(self, board: Board, statistics: Callable[[], Statistics] | None) -> None:
        self._board, self._statistics = board, statistics

    def __rich_console__(self, console: Console, options: Any) -> Iterator[RenderableType]:
        if self._statistics is not None:
            self._board.statistics = self._statistics()
        if self._board.done + self._board.failed < self._board.tickets:
            self._board.now_s = time.monotonic()
        yield frame(self._board, options.max_width, options.height or console.height)


@contextmanager
def live(board: Board, statistics: Callable[[], Statistics] | None, console: Console) -> Iterator[None]:
    """Show the board while the block runs, and nothing of it afterwards: what stays is the conclusion."""
    with Live(_Frame(board, statistics), console=console, refresh_per_second=FRAMES_PER_S, transient=True):
        yield


def letter_panel(subject: str, body: str) -> RenderableType:
    """Return the letter a customer gets, on its own paper."""
    return Panel(Text(body), title=subject, width=76, padding=(1, 2), border_style="cyan")


class Picture:
    """The wrapped arm as it looked in the middle, and the demo's conclusion: an SVG for a page."""

    width, height = 104, 34

    def __init__(self) -> None:
        self._middle: RenderableType | None = None

    @contextmanager
    def watch(self, board: Board, statistics: Callable[[], Statistics]) -> Iterator[None]:
        """Keep the view of the moment when a third of the tickets are answered, while the block runs."""
        before = board.sink

        def look(line: Line) -> None:
            if before is not None:
                before(line)
            if self._middle is None and 3 * board.done >= board.tickets:
                board.statistics = statistics()
                self._middle = frame(board, self.width, self.height)

        board.sink = look
        yield

    def save(self, path: Path, conclusion: Sequence[timeline.Line]) -> None:
        """Write the picture, without reference to fonts elsewhere."""
        console = Console(
            record=True, width=self.width, file=io.StringIO(), force_terminal=True, color_system="truecolor"
        )
        if self._middle is not None:
            console.print(self._middle, Text(""))
        console.print(timeline.rich_text(conclusion))
        picture = console.export_svg(title="orla-lg demo")
        path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", picture, flags=re.DOTALL), encoding="utf-8")
