"""How the code stands as a house: what one call passes, circles, large classes, names, prose, lines, locks.

    make house                     the table
    python bench/house.py --more   also what stands behind its figures

The simplest wrapped call is one ``ChatOpenAI.invoke`` in the only node of a wrapped graph, at a stub server, after a
few that warm everything up. Python calls are those of the package's functions, counted by ``sys.setprofile`` (each
resumption of a generator is one); all else is read from the sources.
"""

from __future__ import annotations

import argparse
import ast
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

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = (ROOT / "orla_lg", ROOT / "adapters")
PERSON_WORDS = (
    "who",
    "whom",
    "whose",
    "whoever",
    "nobody",
    "somebody",
    "anybody",
    "everybody",
    "told",
    "said",
    "anew",
)
LOCKS = ("Lock", "RLock", "Condition", "Semaphore")
KINDS_OF_ENGINE = ("slots",)
"""What is ``None`` on one of the two kinds of engine."""


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


# What the sources say


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
    """Return the sets of modules that reach each other, the largest first (Tarjan, without recursion)."""
    order: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []
    for root in graph:
        if root in order:
            continue
        work: list[tuple[str, Iterator[str]]] = [(root, iter(sorted(graph[root])))]
        order[root] = low[root] = len(order)
        stack.append(root)
        while work:
            node, following = work[-1]
            for other in following:
                if other not in order:
                    order[other] = low[other] = len(order)
                    stack.append(other)
                    work.append((other, iter(sorted(graph[other]))))
                    break
                if other in stack:
                    low[node] = min(low[node], order[other])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    at = stack.index(node)
                    if len(stack) - at > 1:
                        found.append(set(stack[at:]))
                    del stack[at:]
    return sorted(found, key=len, reverse=True)


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
    return 1000 * sum(word in PERSON_WORDS for word in words) / max(1, len(words))


def locks(module: Module) -> int:
    """Return how many locks a module makes."""
    calls = (node.func for node in ast.walk(module.tree) if isinstance(node, ast.Call))
    return sum(_last(function) in LOCKS for function in calls)


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


# What one call passes


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
    """Run *work* and return what it passes, in all threads that begin meanwhile."""
    seen: Counter[tuple[str, str]] = Counter()
    ours = tuple(f"{folder}/" for folder in PACKAGES)

    def note(frame: Any, event: str, _: object) -> None:
        if event == "call":
            file = frame.f_code.co_filename
            if not file.startswith(ours):  # what a dataclass generates has the file of its caller's caller
                file = file if file != "<string>" else frame.f_globals.get("__file__") or ""
            if file.startswith(ours):
                seen[str(Path(file).relative_to(ROOT)), frame.f_code.co_name] += 1

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # type: ignore[arg-type]
    return Passed(seen)


def simplest_call() -> tuple[Passed, Passed]:
    """Return what the simplest wrapped call passes, and what the whole run of its graph does."""
    from langchain_openai import ChatOpenAI
    from langgraph.graph import START, MessagesState, StateGraph
    from overhead import stub
    from pydantic import SecretStr

    from orla_lg import Backend, Orla

    with stub() as url, Orla([Backend("main", url, model="stub-model")], {"*": "main"}) as orla:
        model = ChatOpenAI(model="stub-model", base_url=url, api_key=SecretStr("any"))

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


# The table


def table(rows: Iterable[tuple[str, str, str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (("", "now", "wanted"), ("---",) * 3, *rows))


def rows(all_: list[Module], call: Passed, whole: Passed) -> Iterator[tuple[str, str, str]]:
    core = [module for module in all_ if module.name.startswith("orla_lg.core")]
    spine = [module for module in core if module.file.parent.name == "core"]
    in_core = {file for file in call.files if file.startswith("orla_lg/core/")}
    in_spine = {file for file in in_core if file.count("/") == 2}
    yield "files that the simplest wrapped call passes", f"{len(call.files)}", "≤ 40"
    yield "of these in the core, in the spine", f"{len(in_core)}, {len(in_spine)}", "spine ≤ 17"
    yield "Python calls of it; objects made", f"{call.calls.total()}; {call.made}", "≤ 300"
    yield "the same of the whole run: files; calls", f"{len(whole.files)}; {whole.calls.total()}", ""
    names = {module.name for module in all_}
    for types, what in ((True, "type imports included"), (False, "at run time")):
        found = circles({module.name: imports(module, names, types=types) for module in all_})
        yield f"files in circles, {what}", str(sum(map(len, found))), "0"
    yield "spine: files; lines", f"{len(spine)}; {sum(each.lines for each in spine):,}", "≤ 17; ≤ 4,000"
    yield "core: files; lines", f"{len(core)}; {sum(each.lines for each in core):,}", "≤ 11,500 lines"
    apart = {each.name: count for each in all_ if (count := told_apart(each))}
    yield "places with `slots is None`; files", f"{sum(apart.values())}; {len(apart)}", "0"
    sizes = [
        (methods(node), len(imports(each, names)), node.name, each.name) for each in core for node in classes(each)
    ]
    for count, imported, name, where in sorted(sizes, reverse=True)[:5]:
        yield f"methods of `{name}` (`{where}`); modules imported there", f"{count}; {imported}", "≤ 20; ≤ 12"
    yield "class names in two or more modules", str(len(names_twice(all_))), "0"
    yield "person-words per 1,000 words of prose: core", f"{person_words(core):.1f}", "< 5"
    yield "the same: all", f"{person_words(all_):.1f}", ""
    yield "locks made in the core; in all", f"{sum(map(locks, core))}; {sum(map(locks, all_))}", ""
    rooms: dict[str, list[Module]] = defaultdict(list)
    for module in all_:
        rooms[module.room].append(module)
    for room, inside in sorted(rooms.items()):
        yield f"lines of `{room}` ({len(inside)} files)", f"{sum(each.lines for each in inside):,}", ""
    bench = modules(ROOT / "bench")
    yield f"lines of `bench` ({len(bench)} files)", f"{sum(each.lines for each in bench):,}", "≤ 4,800"


def more(all_: list[Module], call: Passed) -> Iterator[str]:
    names = {module.name for module in all_}
    yield "Circles, type imports included:"
    yield from (f"  {', '.join(sorted(found))}" for found in circles({m.name: imports(m, names) for m in all_}))
    yield "Class names in two or more modules:"
    yield from (f"  {name}: {', '.join(places)}" for name, places in names_twice(all_).items())
    yield "Locks:"
    yield from (f"  {module.name}: {count}" for module in all_ if (count := locks(module)))
    yield "Files that the simplest wrapped call passes, with calls:"
    by_file = Counter[str]()
    for (file, _), count in call.calls.items():
        by_file[file] += count
    yield from (f"  {count:>4} {file}" for file, count in by_file.most_common())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--more", action="store_true", help="list what stands behind the figures")
    args = parser.parse_args()
    all_, (call, whole) = modules(*PACKAGES), simplest_call()
    print(table(rows(all_, call, whole)))
    if args.more:
        print("\n".join(more(all_, call)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
