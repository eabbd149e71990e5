"""Every code block in README and docs runs: Python is executed, TOML loaded, commands parsed."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from orla_lg import cli, config
from orla_lg.core.engine.registry import ENTRY_POINTS
from orla_lg.mappers.features import DENSE
from orla_lg.mappers.learned import Model
from tests.stub_engine import StubEngine

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def engines() -> Iterator[dict[str, str]]:
    """Stubs in the places of the engines that the pages name."""
    with StubEngine(slots=2) as light, StubEngine(slots=4) as heavy:
        yield {"http://127.0.0.1:8001/v1": light.url, "http://127.0.0.1:8002/v1": heavy.url}


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_runs_from_top_to_bottom(
    page: Path, engines: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Model(0.0, (0.0,) * len(DENSE), 0.5).save("mapper.json")  # the file that a page has fitted before
    space: dict[str, object] = {"__name__": "docs"}
    try:
        for code in blocks(page, "python"):
            for written, real in engines.items():
                code = code.replace(written, real)
            exec(compile(code, str(page), "exec", dont_inherit=True), space)
    finally:
        for value in list(space.values()):
            if type(value).__name__ == "Orla":
                value.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", pages_with("toml"), ids=lambda page: page.name)
def test_toml_is_a_valid_configuration(page: Path, tmp_path: Path) -> None:
    for number, code in enumerate(blocks(page, "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(code, encoding="utf-8")
        if "[project]" in code:  # a plug-in's own project, not a configuration of ours
            assert ENTRY_POINTS in tomllib.loads(code)["project"]["entry-points"]
        else:
            assert config.load(file).backends


def commands() -> list[str]:
    lines = [line for page in PAGES for code in blocks(page, "bash") for line in code.splitlines()]
    return [line.split(" #")[0].strip() for line in lines if line.strip() and not line.startswith("#")]


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("orla-lg")])
def test_orla_lg_takes_the_command(line: str) -> None:
    assert callable(cli.parser().parse_args(shlex.split(line)[1:]).run)


@pytest.mark.parametrize("line", [line for line in commands() if line.startswith("make")])
def test_make_has_the_target(line: str) -> None:
    target = shlex.split(line)[1]
    assert re.search(rf"^{re.escape(target)}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = [link for link in _LINK.findall(page.read_text(encoding="utf-8")) if not (page.parent / link).exists()]
    assert not broken
