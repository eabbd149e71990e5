"""How the code stands as a house: what one call passes, circles, large classes, names, prose, lines, locks.

    make house                     the table; written into docs/architecture.md
    make house HOUSE=--more        also what stands behind its figures

The simplest wrapped call is one ``ChatOpenAI.invoke`` in the only node of a wrapped graph, at a stub server, after a
few that warm everything up. Python calls are those of the package's functions, counted by ``sys.setprofile`` (each
resumption of a generator is one); all else is read from the sources.
"""

from __future__ import annotations

import ast
import gc
import io
import re
import sys
import threading
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.lib.command import DOCS, ROOT, finish, parser
from bench.lib.figures import table

PACKAGES = (ROOT / "orla_lg", ROOT / "adapters")
CORE, SCHEDULER = "orla_lg.core", "BackendScheduler"
PERSON_WORD = re.compile("who(m|se|ever)?|(no|some|any|every)body|told|said|anew")
LOCKS = ("Lock", "RLock", "Condition", "Semaphore")
KINDS_OF_ENGINE = ("slots",)
"""What is ``None`` on one of the two kinds of engine."""

REASONS = {
    "BackendScheduler": "the one of a backend: its queue, its cache, its grants",
    "WorkflowBook": "the one of all workflows and their runs",
    "Background": "begins the thread once, whichever caller is the first",
    "_after": "counts futures that end on other threads",
    "CostBook": "sums over all backends, and calls of different backends end at once",
    "LoadWatch": "callers ask for a load that the background reads",
    "Estimates": "graphs on all backends teach it",
    "EstimatesFile": "one write at a time, from whichever run ends",
    "InFlightCall": "a stream may be closed by one thread and collected by another; it ends once",
    "Journal": "opens and ends the file; lines are put without it",
    "Learners": "mappers are added while calls end",
    "LabelFlow": "nodes of one workflow start in several threads while its calls ask which labels they carry",
    "LimitBook": "limits span backends; what is set aside and what is settled must agree",
    "Lookahead": "one forecast for each graph, whichever run begins first",
    "MemoryManager": "orders that are due later, from the background and from callers",
    "RecordBook": "records of all backends, in one order",
    "RecordUpdates": "what the journal does not say yet, of all backends",
    "ReturnBook": "asked under the locks of backends; innermost",
    "RunTrace": "branches of one run enter and leave on several threads",
    "Salts": "one salt for a tenant on all backends",
    "Steering": "a change of policies on several backends is undone as a whole",
    "Waiters": "a waiter is registered before it sleeps; closing wakes all",
}
"""Locks of the core, by the class or function that makes them, and why each is one of its own."""


@dataclass(frozen=True)
class Module:
    name: str
    file: Path
    text: str
    tree: ast.Module

    @property
    def room(self) -> str:
        """The package that it lies in; the spine is ``orla_lg.core`` itself."""
        return self.name if self.file.name == "__init__.py" else self.name.rpartition(".")[0] or self.name

    @property
    def lines(self) -> int:
        return self.text.count("\n")


def modules(*folders: Path) -> list[Module]:
    """Return the modules below folders, each of which is a package or holds packages."""
    found = []
    for folder in folders:
        base = folder.parent if (folder / "__init__.py").exists() else folder
        for file in sorted(folder.rglob("*.py")):
            parts = file.relative_to(base).with_suffix("").parts
            text = file.read_text()
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            found.append(Module(name, file, text, ast.parse(text)))
    return found


def imports(module: Module, known: Iterable[str], *, types: bool = True) -> set[str]:
    """Return the modules in *known* that a module imports, wherever it does; without *types* not those for types."""
    names, found, todo = set(known), set[str](), list[ast.AST](module.tree.body)
    while todo:
        node = todo.pop()
        if not types and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            todo += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & names or {node.module}
        todo += ast.iter_child_nodes(node)
    return found & names - {module.name}


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that reach each other, the largest first."""
    reached: dict[str, set[str]] = {}
    for root in graph:
        reached[root], todo = set(), [*graph[root]]
        while todo:
            if (node := todo.pop()) not in reached[root]:
                reached[root].add(node)
                todo += graph.get(node, ())
    found = {frozenset(other for other in reached[root] if root in reached.get(other, ())) for root in graph}
    return sorted((set(each) for each in found if len(each) > 1), key=len, reverse=True)


def is_re_export(module: Module) -> bool:
    """Whether a module has nothing of its own: its docstring, imports and ``__all__``."""
    return not any(
        not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
        and not (isinstance(node, ast.Assign) and _last(node.targets[0]) == "__all__")
        for node in module.tree.body
    )


def spine(core: Iterable[Module]) -> list[Module]:
    """Return the modules that lie in the core itself, without those that only pass names on."""
    return [each for each in core if each.room == CORE and each.name != CORE and not is_re_export(each)]


def classes(module: Module) -> list[ast.ClassDef]:
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.ClassDef)]


def methods(node: ast.ClassDef) -> int:
    return sum(isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef) for each in node.body)


def names_twice(among: Iterable[Module]) -> dict[str, list[str]]:
    """Return the names of classes that stand in two or more modules."""
    where: dict[str, list[str]] = defaultdict(list)
    for module in among:
        for name in {node.name for node in classes(module)}:
            where[name].append(module.name)
    return {name: places for name, places in sorted(where.items()) if len(places) > 1}


def prose(module: Module) -> str:
    """Return a module's comments, and its strings that stand by themselves: docstrings, of fields too."""
    comments = [
        token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(module.text).readline)
        if token.type == tokenize.COMMENT
    ]
    strings = [
        node.value.value
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    ]
    return "\n".join(comments + strings)


def person_words(among: Iterable[Module]) -> float:
    """Return how many of 1,000 words of prose make persons of things."""
    words = [word.lower() for module in among for word in re.findall(r"[A-Za-z']+", prose(module))]
    return 1000 * sum(PERSON_WORD.fullmatch(word) is not None for word in words) / max(1, len(words))


def locks(module: Module) -> Counter[str]:
    """Return how many locks a module makes, by the outermost class or function that does."""
    return Counter(
        outer.name if isinstance(outer, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) else module.name
        for outer in module.tree.body
        for node in ast.walk(outer)
        if isinstance(node, ast.Call) and _last(node.func) in LOCKS
    )


def told_apart(module: Module) -> int:
    """Return in how many places it is asked which of two kinds an engine is: ``slots is None`` and the like."""
    return sum(
        _last(node.left) in KINDS_OF_ENGINE
        and isinstance(node.ops[0], ast.Is | ast.IsNot)
        and isinstance(node.comparators[0], ast.Constant)
        and node.comparators[0].value is None
        for node in ast.walk(module.tree)
        if isinstance(node, ast.Compare)
    )


def _last(node: ast.expr) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


@dataclass(frozen=True)
class Passed:
    """The Python functions of the package that a call runs through, with how often."""

    calls: Counter[tuple[str, str]]
    """By file, relative to the repository, and function."""

    @property
    def files(self) -> set[str]:
        return {file for file, _ in self.calls}

    @property
    def made(self) -> int:
        """Objects with an ``__init__`` of their own or of a dataclass's."""
        return sum(count for (_, function), count in self.calls.items() if function == "__init__")


def passed(work: Any) -> Passed:
    """Run *work* and return what it passes, in all threads that begin meanwhile; the collector is off then."""
    seen: Counter[tuple[str, str]] = Counter()
    ours = tuple(f"{folder}/" for folder in PACKAGES)

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if not file.startswith(ours):  # what a dataclass generates has the file of its caller's caller
                file = file if file != "<string>" else frame.f_globals.get("__file__") or ""
            if file.startswith(ours):
                seen[str(Path(file).relative_to(ROOT)), frame.f_code.co_name] += 1

    collected = gc.isenabled()
    gc.disable()  # what it collects has finalizers of ours, and when it runs is chance
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
        if collected:
            gc.enable()
    return Passed(seen)


def simplest_call() -> tuple[Passed, Passed]:
    """Return what the simplest wrapped call passes, and what the whole run of its graph does."""
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from pydantic import SecretStr

    from orla_lg import Backend, Orla
    from orla_lg.testing.faults import FaultEngine

    with FaultEngine(models=("stub",)) as engine, Orla([Backend("main", engine.url)], {"*": "main"}) as orla:
        model = ChatOpenAI(model="stub", base_url=engine.url, api_key=SecretStr("any"))

        inner: list[Passed] = []

        def node(state: MessagesState) -> dict[str, Any]:
            if not inner:
                return {"messages": [model.invoke(state["messages"])]}
            answers: list[Any] = []
            inner[0] = passed(lambda: answers.append(model.invoke(state["messages"])))
            return {"messages": answers}

        graph = orla.wrap(StateGraph(MessagesState).add_node("node", node).add_edge(START, "node").compile())
        asked: Any = {"messages": [("user", "hello")]}
        for _ in range(5):
            graph.invoke(asked)
        whole = passed(lambda: graph.invoke(asked))
        inner.append(whole)
        graph.invoke(asked)
        return inner[0], whole


Row = tuple[str, str, str, str]
HEADS = ("", "before", "now", "wanted")
"""*before*: when the core had no rooms yet."""


def row(what: str, *now: float, before: str = "", wanted: str = "") -> Row:
    shown = (f"{each:.1f}" if isinstance(each, float) else f"{each:,}" for each in now)
    return what, before, "; ".join(shown), wanted


def rows(all_: list[Module], call: Passed, whole: Passed) -> Iterator[Row]:
    core, names = [module for module in all_ if module.name.startswith(CORE)], {module.name for module in all_}
    in_core = {file for file in call.files if file.startswith("orla_lg/core/")}
    in_spine = in_core & {str(each.file.relative_to(ROOT)) for each in spine(core)}
    yield row("files that the simplest wrapped call passes", len(call.files), before="59", wanted="≤ 40")
    yield row("of these in the core; in the spine", len(in_core), len(in_spine), before="52",
              wanted="spine ≤ 17")  # fmt: skip
    yield row("Python calls of it; objects made", call.calls.total(), call.made, before="535; 63",
              wanted="≤ 300")  # fmt: skip
    yield row("the whole run of its graph: files; calls", len(whole.files), whole.calls.total())
    for types, before, what in ((True, "52", "type imports included"), (False, "0", "at run time")):
        found = circles({module.name: imports(module, names, types=types) for module in all_})
        yield row(f"files in circles, {what}", sum(map(len, found)), before=before, wanted="0")
    inner = spine(core)
    yield row("spine: files; lines", len(inner), _lines(inner), before="one corridor of 79",
              wanted="≤ 17; ≤ 4,000")  # fmt: skip
    yield row("core: files; lines", len(core), _lines(core), before="79; 13,965", wanted="≤ 11,500 lines")
    apart = [count for each in core if (count := told_apart(each))]
    yield row("places in the core with `slots is None`; files", sum(apart), len(apart), before="26; 5",
              wanted="0")  # fmt: skip
    for where, node in ((each, node) for each in core for node in classes(each) if node.name == SCHEDULER):
        yield row(f"methods of `{SCHEDULER}`; modules imported", methods(node),
                  len(imports(where, names)), before="38; 33", wanted="≤ 20; ≤ 12")  # fmt: skip
    largest = max((methods(node), node.name) for each in core for node in classes(each) if node.name != SCHEDULER)
    yield row(f"methods of the largest other class of the core, `{largest[1]}`", largest[0])
    yield row("class names in two or more modules", len(names_twice(all_)), before="41", wanted="0")
    yield row("person-words per 1,000 words of prose: core", person_words(core), before="19.6", wanted="< 5")
    yield row("the same: all", person_words(all_))
    made = [sum(locks(each).total() for each in among) for among in (core, all_)]
    yield row("locks made in the core; in all", *made, before="22", wanted="each with its reason")
    bench = modules(ROOT / "bench")
    yield row("bench: files; lines", len(bench), _lines(bench), before="6,971 lines", wanted="≤ 4,800 lines")
    by_room: dict[str, list[Module]] = defaultdict(list)
    for module in all_:
        by_room[module.room].append(module)
    for room, inside in sorted(by_room.items()):
        yield row(f"`{room}`: files; lines", len(inside), _lines(inside))


def _lines(among: Iterable[Module]) -> int:
    return sum(each.lines for each in among)


def more(all_: list[Module], call: Passed) -> Iterator[str]:
    names = {module.name for module in all_}
    yield "Circles, type imports included:"
    yield from (f"  {', '.join(sorted(found))}" for found in circles({m.name: imports(m, names) for m in all_}))
    yield "Class names in two or more modules:"
    yield from (f"  {name}: {', '.join(places)}" for name, places in names_twice(all_).items())
    yield "Locks:"
    for module in all_:
        yield from (f"  {module.name}: {name}: {REASONS.get(name, '')}" for name in locks(module))
    yield "Files that the simplest wrapped call passes, with calls:"
    by_file = Counter[str]()
    for (file, _), count in call.calls.items():
        by_file[file] += count
    yield from (f"  {count:>4} {file}" for file, count in by_file.most_common())


def main() -> int:
    options = parser("house", __doc__)
    options.add_argument("--more", action="store_true", help="list what stands behind the figures")
    args = options.parse_args()
    all_, (call, whole) = modules(*PACKAGES), simplest_call()
    lines = table(HEADS, rows(all_, call, whole))
    finish(lines, "house", DOCS / "architecture.md")
    if args.more:
        print("\n".join(more(all_, call)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
