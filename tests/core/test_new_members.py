"""A new verb, effect or figure of limits that is forgotten somewhere is found when the place is imported.

Each is added here to the source of its enumeration, in a process of its own; every table that must name it is then
in the row of "Where to change what" in ``docs/architecture.md``.
"""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

from orla_lg.core.boundary.complete import complete
from orla_lg.core.call import Usage
from orla_lg.core.engine.backend import Cost
from orla_lg.core.limits.limits import FIGURES
from orla_lg.core.limits.usage import NOTHING, Amount, figures_of, used
from orla_lg.core.memory.events import Verb
from orla_lg.core.memory.verbs import VERBS
from tests.test_layering import ROOT

PROGRAM = """
import importlib.abc, importlib.machinery, sys
from orla_lg.core.boundary import complete as checks

MODULE, OLD, NEW, RECORDS = sys.argv[1:]

class Added(importlib.machinery.SourceFileLoader):
    def get_data(self, path):
        data = super().get_data(path)
        if path.endswith(".py"):
            assert OLD.encode() in data
            return data.replace(OLD.encode(), NEW.encode(), 1)
        raise OSError("no cached bytecode: the source is another one")

    def set_data(self, path, data, **_):
        pass

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name == MODULE else None
        if spec is not None:
            spec.loader = Added(name, spec.origin)
        return spec

def complete(names, table, what):
    missing = [name for name in names if name not in table]
    if missing:
        print(sys._getframe(1).f_globals["__name__"])
        filler = next(iter(table.values()))
        table = {**table, **{name: filler for name in missing}}
    return table

sys.meta_path.insert(0, Finder())
if RECORDS:
    checks.complete = complete
import orla_lg.core.serving, orla_lg.explain, orla_lg.serve.access.commands
"""

KINDS = {
    "verb": (
        "orla_lg.core.memory.events",
        '    RESTORE = "restore"',
        '    RESTORE = "restore"\n    COMPRESS = "compress"',
        "something new that a memory policy may ask of a cache",
    ),
    "effect": (
        "orla_lg.core.engine.backend",
        '    FREED = "freed"',
        '    COMPRESSED = "compressed"\n    FREED = "freed"',
        "an effect that an engine's cache can have",
    ),
    "figure": (
        "orla_lg.core.limits.limits",
        '    "wall_s": LimitFigure(',
        '    "output_tokens": LimitFigure("{} tokens of answers", whole=True),\n    "wall_s": LimitFigure(',
        "a figure that can be limited",
    ),
}


def imported(kind: str, *, records: bool) -> subprocess.CompletedProcess[str]:
    module, old, new, _ = KINDS[kind]
    command = [sys.executable, "-c", PROGRAM, module, old, new, "yes" if records else ""]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_forgotten_is_named_at_import(kind: str) -> None:
    done = imported(kind, records=False)
    assert done.returncode == 1
    assert re.search(r"TypeError: .* has no entry for \w+: add one", done.stderr), done.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_the_page_on_architecture_names_each_place(kind: str) -> None:
    done = imported(kind, records=True)
    assert done.returncode == 0, done.stderr
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    (row,) = re.findall(rf"^\| {KINDS[kind][-1]} \| (.*) \|$", page, re.M)
    linked = {file.removesuffix(".py").replace("/", ".") for file in re.findall(r"\(\.\./([\w/.]+)\)", row)}
    assert {*done.stdout.split()} <= linked
    assert KINDS[kind][0] in linked


@pytest.mark.parametrize("figure", FIGURES)
def test_a_call_uses_something_of_each_figure(figure: str) -> None:
    amount = used(Usage(prompt_tokens=10, cached_tokens=4, completion_tokens=5), Cost(1.0, 1.0), 2.0)
    assert getattr(amount, figure) > 0, f"usage.used says nothing of {figure}: what is limited would never be counted"


def test_amounts_are_kept_in_the_order_of_the_figures() -> None:
    numbers = tuple(range(1, len(FIGURES) + 1))
    assert figures_of(Amount(*numbers)) == numbers
    amount = Amount(*numbers)
    assert figures_of(amount.plus(amount)) == tuple(2 * each for each in numbers), "plus leaves a figure out"
    assert amount.minus(amount) == NOTHING, "minus leaves a figure out"
    fine = Amount(*(0 if each.whole else 10.0**-each.digits for each in FIGURES.values()))  # type: ignore[arg-type]
    assert NOTHING.plus(fine) == fine


def test_an_entry_for_what_there_is_not_is_named() -> None:
    with pytest.raises(TypeError, match=r"^a table has an entry for three, which there is not: remove it$"):
        complete(("one", "two"), {"one": 1, "two": 2, "three": 3}, "a table")


def test_no_two_verbs_are_equally_strong() -> None:
    assert len({meaning.strength for meaning in VERBS.values()}) == len(Verb)
