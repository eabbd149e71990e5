"""The stages of a graph as a tree: what lies inside what, and what decides each; as text, data, and a picture."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from xml.sax.saxutils import escape

from orla_lg.arguments import answering

HEAD = ("", "stage", "runs on", "decided by", "also under")

LEGEND = (
    "A stage is a node with code of its own: it calls models. What is said of a node covers all that runs inside it,",
    "unless a nearer name says otherwise.",
)


@answering
@dataclass(frozen=True, slots=True)
class StageTree:
    """A graph, a node, a tool, or a graph in one of these, with what is inside it; ``str`` draws it."""

    name: str
    kind: str
    """``graph``, ``agent``, ``node`` or ``tool``."""
    stage: str = ""
    """The key that mappings, limits and policies find it by; empty for what makes no calls itself."""
    backends: tuple[str, ...] = ()
    """Where its calls go, in order of preference; empty where each call decides."""
    by: str = ""
    """The entry that says so."""
    open: bool = False
    """Whether a mapper that is asked before may choose any other backend."""
    under: tuple[str, ...] = ()
    """The entries of limits and request policies that hold for it."""
    inside: tuple[StageTree, ...] = ()
    may_begin_early: bool = False
    """It is a tool that may start while a model still decodes (``wrap(tools_safe=...)``)."""

    def walk(self) -> Iterator[StageTree]:
        """Yield it and all in it, each before what is inside."""
        yield self
        for each in self.inside:
            yield from each.walk()

    @property
    def title(self) -> str:
        """The name, with what it is unless it is a plain node, and with whether it may start early."""
        early = ", may start early" if self.may_begin_early else ""
        return self.name if self.kind == "node" else f"{self.name} ({self.kind}{early})"

    @property
    def runs_on(self) -> str:
        """Where its calls go, as text."""
        return ", ".join(self.backends) or ("each call decides" if self.by and self.open else "?" if self.by else "")

    def rows(self) -> list[tuple[str, ...]]:
        """Return a row for each place in it: its branch, and what ``HEAD`` names."""
        return [
            (branch + each.title, each.stage, each.runs_on, each.by, ", ".join(each.under))
            for branch, each in _branches(self, "", "")
        ]

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        said = {
            "stage": self.stage, "backends": list(self.backends), "decided_by": self.by, "open": self.open,
            "under": list(self.under),
        }  # fmt: skip
        inside = {"inside": [each.as_dict() for each in self.inside]} if self.inside else {}
        early = {"may_begin_early": True} if self.may_begin_early else {}
        return {"name": self.name, "kind": self.kind, **(said if self.stage else {}), **early, **inside}

    def __str__(self) -> str:
        rows = [HEAD, *self.rows()]
        shown = [column for column in range(len(HEAD)) if column < 2 or any(row[column] for row in rows[1:])]
        widths = {column: max(len(row[column]) for row in rows) for column in shown}
        return "\n".join("  ".join(f"{row[n]:<{widths[n]}}" for n in shown).rstrip() for row in rows)


MOST_TOOLS = 4
"""So many tools of a node, in which nothing runs, are named."""


def _shown(tree: StageTree) -> list[StageTree]:
    """Return what is inside, with tools in which nothing runs as one, and last; those apart that may start early."""
    plain = [each for each in tree.inside if each.kind == "tool" and not each.inside]
    early = [each for each in plain if each.may_begin_early]
    others = [each for each in tree.inside if each not in plain]
    return [*others, *_as_one(early), *_as_one([each for each in plain if not each.may_begin_early])]


def _as_one(tools: Sequence[StageTree]) -> list[StageTree]:
    """Return tools that are alike as one place."""
    if len(tools) < 2:
        return list(tools)
    more = f" and {len(tools) - MOST_TOOLS} more" if len(tools) > MOST_TOOLS else ""
    names = ", ".join(each.name for each in tools[:MOST_TOOLS])
    return [StageTree(names + more, "tools", may_begin_early=tools[0].may_begin_early)]


def _branches(tree: StageTree, first: str, rest: str) -> Iterator[tuple[str, StageTree]]:
    yield first, tree
    shown = _shown(tree)
    for n, each in enumerate(shown):
        last = n == len(shown) - 1
        yield from _branches(each, rest + ("└─ " if last else "├─ "), rest + ("   " if last else "│  "))


# The picture: boxes in boxes, so that what is inside a node lies inside it.

LINE, PAD, GAP, WIDTH = 22, 10, 8, 640

COLOURS = ("#d6e6f5", "#fbe3cf", "#dcefd9", "#eadcf2", "#f7e7a9")
"""Of stages, by the backend that is named first for them."""

UNDECIDED, GROUP, TOOL = "#eeeeee", "#ffffff", "#f7f7f7"


def picture(tree: StageTree) -> str:
    """Return the tree as an SVG."""
    colours = _colours(tree)
    drawn, height = _box(tree, 1, 1, WIDTH - 2, colours)
    x, y, legend = 4, height + 18, list[str]()
    means = [(colour, f"a stage that runs on {backend}") for backend, colour in colours.items()]
    for colour, meaning in means or [(UNDECIDED, "a stage")]:
        legend.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{colour}" stroke="#888"/>')
        legend.append(_text(x + 18, y, meaning))
        x, y = (4, y + LINE) if x > WIDTH / 3 else (x + WIDTH // 2, y)
    bottom = y + 12 if x > 4 else y - LINE + 12
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {bottom}" width="{WIDTH}" height="{bottom}" '
        f'font-family="sans-serif" font-size="13">',
        f"<title>{escape(f'the stages of {tree.name}')}</title>",
        f'<rect width="{WIDTH}" height="{bottom}" fill="#ffffff"/>',
        *drawn, *legend, "</svg>",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _colours(tree: StageTree) -> dict[str, str]:
    backends = dict.fromkeys(each.backends[0] for each in tree.walk() if each.backends)
    return {backend: COLOURS[n % len(COLOURS)] for n, backend in enumerate(backends)}


def _box(tree: StageTree, x: int, y: int, width: int, colours: dict[str, str]) -> tuple[list[str], int]:
    """Return a place as a box with what is inside it, and the y at which it ends."""
    fill = colours.get(tree.backends[0], UNDECIDED) if tree.backends else UNDECIDED if tree.stage else GROUP
    lines, end = [_text(x + PAD, y + LINE - 6, tree.title, bold=True)], y + LINE + 2
    if tree.stage:
        lines.append(_text(x + width - PAD, y + LINE - 6, tree.stage, mono=True))
    said = " · ".join(each for each in (tree.by and f"{tree.runs_on}, by {tree.by}", *tree.under) if each)
    if said:
        lines.append(_text(x + PAD, end + 12, said))
        end += LINE - 2
    for each in _shown(tree):
        drawn, end = _box(each, x + PAD, end + GAP - 2, width - 2 * PAD, colours)
        lines += drawn
    end += GAP - 2
    is_tool = tree.kind in ("tool", "tools")
    dashed, colour = (' stroke-dasharray="5 3"', TOOL) if is_tool else ("", fill)
    frame = f'<rect x="{x}" y="{y}" width="{width}" height="{end - y}" rx="6" fill="{colour}" stroke="#666"{dashed}/>'
    return [frame, *lines], end


def _text(x: int, y: int, text: str, *, bold: bool = False, mono: bool = False) -> str:
    style = ' font-weight="bold"' if bold else ' font-family="monospace" text-anchor="end"' if mono else ""
    return f'<text x="{x}" y="{y}"{style}>{escape(text)}</text>'
