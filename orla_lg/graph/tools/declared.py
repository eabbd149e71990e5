"""Which tools are declared safe: repeatable, without outside effect, may run beside other tools and twice for a call.

It is declared by name (``wrap(tools_safe={"search"})``), on the tool (``tool.metadata["orla"] = {"safe": True}``),
or, if foreign servers are to be believed, by MCP's ``readOnlyHint`` (``wrap(tools_safe_mcp=True)``). What is not
declared never starts early. Nor does a declared tool that needs its place (``fitness``), or whose call a human is to
approve.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any, Self

from langchain_core.tools import BaseTool
from langgraph.func import _TaskFunction
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from orla_lg.core.boundary import checked
from orla_lg.core.boundary.stage_keys import inner_key, stage_key
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.errors import ConfigError, did_you_mean, shown
from orla_lg.graph.reached import reached_by
from orla_lg.graph.structure import AnyPregel, name_in_tool, title, unbound
from orla_lg.graph.tools.early.approval import approved_by, approved_in, before, halts
from orla_lg.graph.tools.early.fitness import needs_its_place
from orla_lg.graph.tools.early.reasons import LeftOut, NotBegun
from orla_lg.graph.tools.early.streaks import Streak
from orla_lg.graph.tools.metadata import SAFE, check

log = logging.getLogger("orla_lg")

MOST_LEARNED = 1_000
"""So many places are learned of one graph; tools made anew at each call could else be remembered without end."""


@dataclass(frozen=True, slots=True)
class DeclaredTools:
    """What ``wrap`` is given.

    Args:
        names: Of tools that are safe.
        believes_mcp: Whether MCP's ``readOnlyHint`` is believed.
        splits: Whether the next prompt is prefilled while tools still run.
    """

    names: frozenset[str] = frozenset()
    believes_mcp: bool = False
    splits: bool = False

    @classmethod
    def of(cls, tools: Collection[str | BaseTool] | None, *, believes_mcp: bool, splits: bool) -> Self:
        """Return what ``tools_safe``, ``tools_safe_mcp`` and ``split_prompts`` mean.

        Raises:
            ConfigError: They are not what they should be.
        """
        checked.flag("tools_safe_mcp", believes_mcp)
        checked.flag("split_prompts", splits)
        return cls(frozenset(_names(tools)), believes_mcp, splits)

    def safe(self, tool: BaseTool) -> bool:
        """Whether *tool* is declared safe; what it declares itself is stronger than a name or a server's hint."""
        metadata = tool.metadata or {}
        own = metadata.get("orla")
        if isinstance(own, Mapping) and isinstance(own.get(SAFE), bool):
            return bool(own[SAFE])
        return tool.name in self.names or (self.believes_mcp and metadata.get("readOnlyHint") is True)


def _names(tools: object) -> Iterator[str]:
    """Yield the names that ``tools_safe`` gives, of tools too."""
    if tools is None:
        return
    if not isinstance(tools, Sequence | Set) or isinstance(tools, str | bytes):
        raise ConfigError(f"tools_safe must be a list or set of tools' names, or a list of tools, got {shown(tools)}")
    for each in tools:
        if not isinstance(each, str | BaseTool):
            raise ConfigError(f"tools_safe: each of them must be a tool's name, or a tool, got {shown(each)}")
        name = each.name if isinstance(each, BaseTool) else each
        checked.text("tools_safe: each of them", name)
        yield name


NOTHING_DECLARED = DeclaredTools()


@dataclass(frozen=True, slots=True)
class ToolPlace:
    """A tool, and the node that runs it."""

    tool: BaseTool
    within: str
    """The key of the place whose node it is: a graph, or a node that runs tasks; empty for the whole graph."""
    node: str
    """The node's name."""
    seen_running: bool = False
    """The node is known to run it, and not only to refer to it."""
    is_held: bool = False
    """Its calls are approved there before it runs: there it never starts early, whatever else is learned."""


class SafeTools:
    """The tools of one wrapped graph that may start early.

    Args:
        declared: What is declared.
        places: Where the graph runs its safe tools, as far as that shows.
        approved: Names of tools whose calls are approved somewhere in the graph before they run.
        bound: Names of tools that are declared safe and can run in their places only.
    """

    def __init__(
        self, declared: DeclaredTools, places: Collection[ToolPlace] = (), approved: Collection[str] = (),
        bound: Collection[str] = (),
    ) -> None:  # fmt: skip
        self.splits = declared.splits
        self._declared = declared
        self._approved, self._bound = frozenset(approved), frozenset(bound)
        self._lock = threading.RLock()
        """Reentrant, because the collector may end a run, and its starts, at any point of what is done under it."""
        self._places: dict[str, tuple[ToolPlace, ...]] = {}
        """By the tool's name."""
        self._unfit: dict[int, tuple[BaseTool, LeftOut]] = {}
        """Tools that are left out, by id, and why; each is held, so that no other gets its id."""
        self._streaks: dict[tuple[LeftOut, int], Streak] = {}
        """Of tools, by id, whose newest starts came to nothing."""
        self._found: dict[tuple[str, str], ToolPlace | None] = {}
        """By name and the stage whose model calls it."""
        for place in places:
            self._add(place)

    @property
    def names(self) -> frozenset[str]:
        """Of the tools that may start early, as far as they are known."""
        return frozenset(name for name, places in self._places.items() if not all(each.is_held for each in places))

    def offered(self, body: Mapping[str, Any], stage: str) -> Collection[str]:
        """Return the names of the safe tools that a request of *stage* offers to its model, on any wire."""
        known, tools = self._places, body.get("tools")
        if not known or not isinstance(tools, list):
            return ()
        return [name for name in map(_name_in, tools) if name in known and self.place(name, stage) is not None]

    def may_begin(self, name: str, stage: str) -> bool:
        """Whether a tool of the node *stage* may start early, as far as that is known."""
        return any(
            inner_key(place.within, place.node) == stage and not place.is_held and id(place.tool) not in self._unfit
            for place in self._places.get(name, ())
        )

    def place(self, name: str, stage: str) -> ToolPlace | None:
        """Return the tool that a call by the model of *stage* means; ``None`` where no single one is safe."""
        key = (name, stage)
        try:
            return self._found[key]
        except KeyError:
            found = self._found[key] = self._place(name, stage)
            return found

    def _place(self, name: str, stage: str) -> ToolPlace | None:
        here = self._meant(name, stage)
        if len({id(place.tool) for place in here}) != 1 or id(here[0].tool) in self._unfit:
            return None
        if any(place.is_held for place in here):
            return None
        return max(here, key=lambda place: place.seen_running)

    def _meant(self, name: str, stage: str) -> list[ToolPlace]:
        """Return the tools that a call by the model of *stage* may mean."""
        named, around = self._places.get(name, ()), stage
        while True:  # the tools of the model's own graph, else of the graphs around it
            here = [place for place in named if place.within == around]
            if here or not around:
                return here or list(named)
            around = around.rpartition(NAMESPACE_SEPARATOR)[0]

    def why_not(self, name: str, stage: str) -> NotBegun | None:
        """Return why a tool that the model of *stage* calls does not start early; ``None`` where it may."""
        if self.place(name, stage) is not None:
            return None
        here = self._meant(name, stage)
        if name in self._approved or any(place.is_held for place in here):
            return NotBegun.APPROVED
        if (left_out := self._left_out(name)) is not None:
            return NotBegun(left_out)
        if here:
            return NotBegun.SEVERAL
        if name in self._bound:
            return NotBegun.NEEDS_ITS_PLACE
        return NotBegun.UNSEEN if name in self._declared.names else NotBegun.NOT_DECLARED

    def _left_out(self, name: str) -> LeftOut | None:
        with self._lock:
            return next((why for tool, why in self._unfit.values() if tool.name == name), None)

    def used(self, tool: BaseTool, namespace: str) -> None:
        """Learn that the node of a checkpoint namespace runs *tool*, which may not show before the graph runs."""
        if id(tool) in self._unfit or not self._is_declared(tool) or tool.name in self._approved:
            return
        if (streak := self._streaks.get((LeftOut.UNUSED, id(tool)))) is not None:
            streak.ran = True
        within, _, node = stage_key(namespace).rpartition(NAMESPACE_SEPARATOR)
        for place in self._places.get(tool.name, ()):
            if place.tool is tool and place.within == within and place.node == node and place.seen_running:
                return
        if self._holds(within, node):
            return
        if needs_its_place(tool) is not None:  # which takes a millisecond
            self.leave_out(tool, LeftOut.NEEDS_ITS_PLACE)
            return
        with self._lock:
            if sum(map(len, self._places.values())) < MOST_LEARNED:
                self._add(ToolPlace(tool, within, node, seen_running=True))

    def _is_declared(self, tool: BaseTool) -> bool:
        """Whether *tool*, which ``wrap`` may not have seen, is declared safe."""
        try:
            check(tool)
        except ConfigError as error:  # its call is under way, so it runs as ever
            if self.leave_out(tool, LeftOut.NEEDS_ITS_PLACE):
                log.warning("%s; the tool does not start early", error)
            return False
        return self._declared.safe(tool)

    def _holds(self, within: str, node: str) -> bool:
        """Whether calls of a node are approved first; of such a node nothing is learned."""
        return any(
            each.is_held and (each.within, each.node) == (within, node)
            for places in self._places.values() for each in places
        )  # fmt: skip

    def leave_out(self, tool: BaseTool, why: LeftOut) -> bool:
        """Start *tool* early no more; returns whether that is new."""
        with self._lock:
            if id(tool) in self._unfit or len(self._unfit) >= MOST_LEARNED:
                return False
            self._unfit[id(tool)] = tool, why
            self._found = {}
            return True

    def asked(self, tool: BaseTool) -> None:
        """Note that a call asked for what a start of *tool* returned."""
        self._streaks.pop((LeftOut.UNUSED, id(tool)), None)

    def unused(self, tool: BaseTool, calls: Collection[str], stage: str) -> bool:
        """Note that no call asked for starts of *tool*, made in the answers to *calls*, though their run went on.

        Returns whether it is left out for that: *stage*, its node, calls its function, or changes its calls.
        """
        streak = self._in_vain(LeftOut.UNUSED, tool, calls)
        if streak is None:
            return False
        log.warning(
            "tool %r of node %r started early %d times and none was used: the node calls %s; it is not started early "
            "any more", tool.name, stage, streak.starts,
            "it with other arguments" if streak.ran else "its function, not the tool, or does not call it",
        )  # fmt: skip
        return True

    def returned(self, tool: BaseTool) -> None:
        """Note that a call got what a start of *tool* returned."""
        self._streaks.pop((LeftOut.FAILING, id(tool)), None)

    def failed(self, tool: BaseTool, call: str, stage: str, why: str) -> bool:
        """Note that a start of *tool*, in the answer to *call*, brought its call nothing; returns whether it is left
        out for that."""
        streak = self._in_vain(LeftOut.FAILING, tool, [call])
        if streak is None:
            return False
        log.warning(
            "tool %r of node %r started early %d times in a row and ran again in its place, at last because %s; it "
            "is not started early any more", tool.name, stage, streak.starts, why,
        )  # fmt: skip
        return True

    def _in_vain(self, why: LeftOut, tool: BaseTool, calls: Collection[str]) -> Streak | None:
        """Count starts that came to nothing; returns all in a row, once the tool is left out for them."""
        with self._lock:
            if id(tool) in self._unfit:
                return None
            if len(self._streaks) >= MOST_LEARNED:
                self._streaks.clear()
            streak = self._streaks.setdefault((why, id(tool)), Streak(tool))
            if not (streak.goes_on(calls) and self.leave_out(tool, why)):
                return None
            del self._streaks[why, id(tool)]
            return streak

    def _add(self, place: ToolPlace) -> None:
        others = [
            each for each in self._places.get(place.tool.name, ())
            if each.tool is not place.tool or (each.within, each.node) != (place.within, place.node)
        ]  # fmt: skip
        self._places = {**self._places, place.tool.name: (*others, place)}
        self._found = {}


def _name_in(tool: Any) -> str | None:
    """Return the name of a tool in a request: chat completions and Ollama nest it, the other wires do not."""
    if not isinstance(tool, Mapping):
        return None
    function = tool.get("function")
    name = function.get("name") if isinstance(function, Mapping) else tool.get("name")
    return name if isinstance(name, str) else None


def safe_tools(graph: AnyPregel, declared: DeclaredTools) -> SafeTools | None:
    """Return the tools of *graph* that are safe; ``None`` where nothing can be, and its prompts are not split.

    Raises:
        ConfigError: A tool declares something of itself that means nothing.
    """
    shown_tools = list(_tools_in(graph, "", (graph,)))
    places, in_place = list[ToolPlace](), set[str]()
    for place, why_not in shown_tools:
        check(place.tool)
        if declared.safe(place.tool):
            if (reason := why_not or needs_its_place(place.tool)) is None:
                places.append(place)
                continue
            if why_not is not None:
                places.append(replace(place, is_held=True))
            else:
                in_place.add(place.tool.name)
            if place.tool.name in declared.names:
                log.warning(
                    "tool %r of %s is declared safe and does not start early: %s",
                    place.tool.name,
                    title(graph),
                    reason,
                )
        elif place.tool.name in declared.names:
            log.warning(
                "tool %r of %s does not start early: its metadata says that it is not safe, which is stronger than "
                "tools_safe", place.tool.name, title(graph),
            )  # fmt: skip
    _warn_of_unknown(graph, declared.names, {place.tool.name for place, _ in shown_tools})
    if not (declared.names or declared.splits or any(not place.is_held for place in places)):
        return None
    return SafeTools(declared, places, approved_in(graph), in_place)


def _warn_of_unknown(graph: AnyPregel, names: Collection[str], known: Collection[str]) -> None:
    """Warn of declared names that no tool of the graph has, where it shows any: code may make further ones."""
    for name in sorted(set(names) - set(known)) if known else ():
        near = did_you_mean(name, known)
        log.warning(
            "tools_safe names %s, which no tool of %s has as far as it shows%s; should a node run such a tool, it "
            "starts early from then on", shown(name), title(graph), near,
        )  # fmt: skip


def _tools_in(graph: AnyPregel, key: str, around: tuple[object, ...]) -> Iterator[tuple[ToolPlace, str | None]]:
    """Yield the tools that a graph runs, each with why it must not start early there; *key* is the graph's place."""
    nodes = {name: unbound(node.bound) for name, node in graph.nodes.items()}
    run_by_nodes = set[int]()
    approved = approved_by(nodes.values())
    halted = halts(graph, nodes)
    for name, bound in nodes.items():
        if isinstance(bound, ToolNode):
            stopped = halted if halted is not None else before(graph, name)
            for tool in bound.tools_by_name.values():
                run_by_nodes.add(id(tool))
                why_not = "its calls are approved first" if tool.name in approved else stopped
                yield ToolPlace(tool, key, name, seen_running=True), why_not
                yield from _graphs_in(tool, inner_key(key, name), around)
    for name, bound in nodes.items():
        here = inner_key(key, name)
        if isinstance(bound, Pregel):
            yield from _inside(bound, here, around)
        elif not isinstance(bound, ToolNode):
            yield from _of_code(bound, key, name, around, run_by_nodes)


def _of_code(
    bound: Any, within: str, name: str, around: tuple[object, ...], run_by_nodes: Collection[int]
) -> Iterator[tuple[ToolPlace, str | None]]:
    """Yield the tools that the code of a node reaches, itself or in its tasks and graphs."""
    here = inner_key(within, name)
    for each in reached_by(bound):
        if isinstance(each, BaseTool):
            if id(each) not in run_by_nodes:  # a model is given the tools that the graph's tool node runs
                yield ToolPlace(each, within, name), None
                yield from _graphs_in(each, here, around)
        elif isinstance(each, _TaskFunction):
            if not any(each is other for other in around):
                task = str(getattr(each.func, "__name__", "task"))
                yield from _of_code(each, here, task, (*around, each), run_by_nodes)
        else:
            yield from _inside(each, here, around)


def _graphs_in(tool: BaseTool, key: str, around: tuple[object, ...]) -> Iterator[tuple[ToolPlace, str | None]]:
    for each in reached_by(tool):
        if isinstance(each, Pregel):
            name = name_in_tool(each)
            yield from _inside(each, inner_key(key, name, is_graph=True) if name else key, around)


def _inside(graph: AnyPregel, key: str, around: tuple[object, ...]) -> Iterator[tuple[ToolPlace, str | None]]:
    if not any(graph is each for each in around):
        yield from _tools_in(graph, key, (*around, graph))
