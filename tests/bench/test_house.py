"""``make house`` counts what it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench import house

A = '''"""Says who calls; somebody is told."""

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pkg import b


class Same:
    """One."""

    def first(self, slots: object) -> None:
        self.lock = threading.Lock()  # nobody waits
        if slots is None or self.lock is not None:
            return

    async def second(self) -> None:
        if self.slots is not None:
            return
'''
B = "from pkg.a import Same\nfrom pkg import c\n\n\nclass Same2: ...\n\n\nclass Other: ...\n"
C = "class Same: ...\n\n\nclass Other: ...\n"


@pytest.fixture
def found(tmp_path: Path) -> dict[str, Any]:
    package = tmp_path / "pkg"
    package.mkdir()
    for name, text in (("__init__", ""), ("a", A), ("b", B), ("c", C)):
        (package / f"{name}.py").write_text(text)
    return {module.name: module for module in house.modules(package)}


def test_circles_with_and_without_types(found: dict[str, Any]) -> None:
    for types, circles in ((True, [{"pkg.a", "pkg.b"}]), (False, [])):
        graph = {name: house.imports(module, found, types=types) for name, module in found.items()}
        assert house.circles(graph) == circles
    assert house.circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"e", "a"}, "e": {"d"}}) == [
        {"a", "b", "c"},
        {"d", "e"},
    ]


def test_names_methods_locks_and_kinds(found: dict[str, Any]) -> None:
    a = found["pkg.a"]
    assert house.names_twice(found.values()) == {"Other": ["pkg.b", "pkg.c"], "Same": ["pkg.a", "pkg.c"]}
    assert (house.methods(house.classes(a)[0]), house.locks(a), house.told_apart(a)) == (2, {"Same": 1}, 2)
    words = len(["Says", "who", "calls", "somebody", "is", "told", "One", "nobody", "waits"])
    assert house.person_words([a]) == pytest.approx(1000 * 4 / words)


def test_what_only_passes_names_on_is_no_part_of_the_spine(tmp_path: Path) -> None:
    core = tmp_path / "orla_lg" / "core"
    (core / "room").mkdir(parents=True)
    texts = {
        "__init__": '"""Order."""\n',
        "passing": '"""Path."""\n\nfrom a import b\n\n__all__ = ["b"]\n',
        "own": "ONE = 1\n",
        "room/__init__": "",
        "room/inside": "TWO = 2\n",
    }
    for name, text in {**texts, "../__init__": ""}.items():
        (core / f"{name}.py").write_text(text)
    found = [each for each in house.modules(core.parent) if each.name.startswith(house.CORE)]
    assert len(found) == len(texts)
    assert [each.name for each in house.spine(found)] == ["orla_lg.core.own"]


def test_a_row_shows_figures_beside_those_before_and_wanted() -> None:
    assert house.row("what", 1234, 2.345, before="9", wanted="0") == ("what", "9", "1,234; 2.3", "0")


def test_what_is_passed_is_counted_by_file_and_function() -> None:
    from orla_lg.core.call import Hints

    seen = house.passed(lambda: [Hints(), Hints(priority=1.0)])
    assert seen.files == {"orla_lg/core/call.py", "orla_lg/arguments.py"} and seen.made == 2
    assert seen.calls["orla_lg/core/call.py", "__post_init__"] == 2
