"""Every code block in README and docs runs: Python is executed, TOML loaded, commands parsed.

README is short, each page says which question it answers, links and their anchors resolve, reference pages name
everything that there is, and README's figures are those of the pages that it links.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import re
import shlex
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from orla_lg import Backend, Cost, Hints, Limit, Limits, Orla, OrlaSaver, Record, WarmUp, cli, config
from orla_lg.clients.table import ENTRY_POINTS as CLIENTS
from orla_lg.core.engine.registry import ENTRY_POINTS
from orla_lg.mappers.features import DENSE
from orla_lg.mappers.learned import Model
from orla_lg.serve.http.health import CoreState
from orla_lg.serve.settings import DEFAULT_PORT
from tests.serve.in_thread import server
from tests.stub_engine import StubEngine

ROOT = Path(__file__).resolve().parent.parent
README, INDEX = ROOT / "README.md", ROOT / "docs" / "README.md"
PAGES = [README, *sorted((ROOT / "docs").rglob("*.md"))]
MOST_WORDS = 700
"""Of prose in README."""
KINDS = ("Tutorial", "How-to", "Reference", "Explanation")
"""Of pages (Diátaxis), in the order of the index."""
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.M | re.S)
_LINK = re.compile(r"\]\((?!https?:)([^)#\s]*)(?:#([^)\s]+))?\)")
_QUESTION = re.compile(r"> \*\*(.+?):\*\* (.+\?)")


def named(page: Path) -> str:
    return str(page.relative_to(ROOT))


def blocks(page: Path, language: str) -> list[str]:
    return [code for found, code in _BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, language)]


@pytest.fixture
def engines() -> Iterator[dict[str, str]]:
    """Stubs in the places of the engines that the pages name."""
    with StubEngine(slots=2) as light, StubEngine(slots=4) as heavy:
        yield {"http://127.0.0.1:8001/v1": light.url, "http://127.0.0.1:8002/v1": heavy.url}


@contextmanager
def server_of(text: str, folder: Path) -> Iterator[str]:
    """Run a server by the first configuration of a page that reaches one, and yield the page with its URL."""
    if f":{DEFAULT_PORT}" not in text or not any(language == "toml" for language, _ in _BLOCK.findall(text)):
        yield text
        return
    file = folder / "served.toml"
    file.write_text(next(code for language, code in _BLOCK.findall(text) if language == "toml"), encoding="utf-8")
    with server(file) as running:
        while running.server.state is not CoreState.READY:
            time.sleep(0.01)
        yield text.replace(f"http://127.0.0.1:{DEFAULT_PORT}", running.url)


def with_what_they_print(text: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield each block with the ``text`` block that follows at once, if there is one: what it prints."""
    found = list(_BLOCK.finditer(text))
    for block, behind in zip(found, [*found[1:], None], strict=True):
        at_once = behind is not None and behind[1] == "text" and not text[block.end() : behind.start()].strip()
        yield block[1], block[2], behind[2] if behind is not None and at_once else None


def without_numbers(printed: str) -> str:
    return re.sub(r"\d+", "#", printed)


@pytest.mark.parametrize("page", pages_with("python"), ids=named)
def test_python_runs_from_top_to_bottom(
    page: Path,
    engines: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Model(0.0, (0.0,) * len(DENSE), 0.5).save("mapper.json")  # the file that a page has fitted before
    space: dict[str, object] = {"__name__": "docs"}
    text = page.read_text(encoding="utf-8")
    for written, real in engines.items():
        text = text.replace(written, real)
    with server_of(text, tmp_path) as text:
        try:
            for language, code, shown in with_what_they_print(text):
                if language == "toml":
                    Path("orla.toml").write_text(code, encoding="utf-8")
                if language == "python":
                    capsys.readouterr()
                    exec(compile(code, str(page), "exec", dont_inherit=True), space)
                    printed = capsys.readouterr().out
                    assert shown is None or without_numbers(printed) == without_numbers(shown)
        finally:
            for value in list(space.values()):
                if type(value).__name__ == "Orla":
                    value.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("page", pages_with("toml"), ids=named)
def test_toml_is_a_valid_configuration(page: Path, tmp_path: Path) -> None:
    for number, code in enumerate(blocks(page, "toml")):
        file = tmp_path / f"{number}.toml"
        file.write_text(code, encoding="utf-8")
        if "[project]" in code:  # a plug-in's own project, not a configuration of ours
            assert {ENTRY_POINTS, CLIENTS} & set(tomllib.loads(code)["project"]["entry-points"])
        else:
            assert config.load(file).backends


def models_made(code: str) -> list[ast.Call]:
    """Return where code makes a chat model."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return [call for call in calls if isinstance(call.func, ast.Name) and call.func.id in ("ChatOpenAI", "ChatOrla")]


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("page", [*pages_with("python"), *EXAMPLES], ids=named)
def test_no_example_lets_a_small_model_ramble(page: Path) -> None:
    codes = [page.read_text(encoding="utf-8")] if page.suffix == ".py" else blocks(page, "python")
    for model in (made for code in codes for made in models_made(code)):
        given = {keyword.arg for keyword in model.keywords}
        assert given & {"max_tokens", "max_completion_tokens"}, ast.unparse(model)


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


# Links


def without_blocks(page: Path) -> str:
    return _BLOCK.sub("", page.read_text(encoding="utf-8"))


@cache
def anchors(page: Path) -> set[str]:
    """Return the anchors that headings of a page have on GitHub."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(page), re.M)
    bare = [re.sub(r"\[(.+?)\]\(.+?\)", r"\1", heading).lower() for heading in headings]
    slugs = [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in bare]
    return {f"{slug}-{before}" if (before := slugs[:n].count(slug)) else slug for n, slug in enumerate(slugs)}


def leads_nowhere(page: Path, link: str, anchor: str) -> bool:
    target = (page.parent / link).resolve() if link else page
    return not target.exists() or bool(anchor and target.suffix == ".md" and anchor not in anchors(target))


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page: Path) -> None:
    links = _LINK.findall(without_blocks(page))
    assert not [f"{link}#{anchor}" for link, anchor in links if leads_nowhere(page, link, anchor)]


# README in five minutes


def prose(page: Path) -> str:
    """Return what a reader reads: no code, no tables, no targets of links, no marks."""
    text = re.sub(r"^\|.*$", "", without_blocks(page), flags=re.M)
    text = re.sub(r"!\[[^\]]*\]\([^)]*\)", "", text)
    return re.sub(r"\]\([^)]*\)", "", text)


def test_readme_is_read_in_five_minutes() -> None:
    words = [word for word in prose(README).split() if any(map(str.isalnum, word))]
    assert len(words) <= MOST_WORDS


def test_readme_says_first_what_comes_first() -> None:
    text = README.read_text(encoding="utf-8")
    order = ["![", "## What it gains", "git clone ", "orla-lg demo --ticket", "orla.wrap(", "orla-lg explain",
             "(docs/README.md)"]  # fmt: skip
    assert all(part in text for part in order)
    assert sorted(order, key=text.index) == order


def test_readme_has_the_figures_of_the_pages_it_links() -> None:
    rows = re.findall(r"^\| .*\d.*$", README.read_text(encoding="utf-8"), re.M)
    assert len(rows) > 3
    target = ""
    for row in rows:
        load, _, bare, wrapped, _ = (cell.strip() for cell in row.strip("|").split("|"))
        target = links[0][0] if (links := _LINK.findall(load)) else target
        page = (ROOT / target).read_text(encoding="utf-8").replace(",", "")
        for figure in re.findall(r"[\d.]*\d", f"{bare} {wrapped}".replace(",", "")):
            assert re.search(rf"(?<![\d.]){re.escape(figure)}(?![\d.]*\d)", page), f"{target} has no {figure}: {row}"


@pytest.mark.parametrize("drawing", re.findall(r"!\[[^\]]*\]\(([^)]*\.svg)\)", README.read_text(encoding="utf-8")))
def test_readmes_picture_suits_a_light_and_a_dark_ground(drawing: str) -> None:
    drawn = (ROOT / drawing).read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)@media \(prefers-color-scheme: dark\) {(.*?)</style>", drawn, re.S)
    assert style is not None
    light, dark = (set(re.findall(r"\.([a-z]+)", part)) for part in style.groups())
    used = {name for names in re.findall(r'class="([^"]+)"', drawn) for name in names.split()}
    assert used <= light
    assert used - dark <= {"head", "mark"}, "these have the colour of all text, or of text on a colour"


# Pages and their questions


def question(page: Path) -> tuple[str, str]:
    found = _QUESTION.fullmatch(page.read_text(encoding="utf-8").split("\n")[2])
    assert found is not None, f"{page.name}: its third line must be '> **KIND:** which question it answers?'"
    return found[1], found[2]


@pytest.mark.parametrize("page", PAGES[1:], ids=named)
def test_a_page_says_which_question_it_answers(page: Path) -> None:
    kind, _ = question(page)
    assert kind in KINDS


def test_the_index_has_a_line_for_each_page_under_its_kind() -> None:
    parts = re.split(r"^## (.+)$", INDEX.read_text(encoding="utf-8"), flags=re.M)
    assert tuple(parts[1::2]) == KINDS
    listed = {
        (kind, (INDEX.parent / link).resolve(), asked)
        for kind, part in zip(KINDS, parts[2::2], strict=True)
        for link, asked in re.findall(r"^\* \[.+?\]\((\S+)\): (.+)$", part, re.M)
    }
    there = {(question(page)[0], page, question(page)[1]) for page in PAGES if page not in (README, INDEX)}
    assert listed == there


# Reference pages name everything that there is


def part_of(page: str, heading: str) -> str:
    """Return what stands under one of a page's headings, or all of the page."""
    text = without_blocks(ROOT / "docs" / page)
    part = re.search(rf"^#+ {re.escape(heading)}$(.*?)(?=^#|\Z)", text, re.M | re.S) if heading else None
    assert part is not None or not heading, f"{page} has no heading {heading!r}"
    return text if part is None else part[1]


def first_cells(page: str, heading: str = "") -> set[str]:
    """Return what the first two cells of the rows of tables name, on a page or under one of its headings."""
    rows = re.findall(r"^\| (.+?) (?<!\\)\| (.+?) (?<!\\)\|", part_of(page, heading), re.M)
    return {name for row in rows for cell in row for name in re.findall(r"`([^`]+)`", cell)}


def names_of(kind: type) -> set[str]:
    return {each.name for each in fields(kind) if not each.name.startswith("_")}


ORLA = "`Orla`, and the top of `orla.toml`"
KEYS = {
    ORLA: set(inspect.signature(Orla).parameters)
    | {name for name in inspect.signature(Orla.wrap).parameters if name != "self"}
    | set(config.ConfigFile.model_fields) - {"backends", "mapping", "variants", "limits", "ray", "serve", "stages"}
    | {
        "[backends.NAME]",
        "[mapping]",
        "[variants.NAME]",
        "[limits]",
        "[ray]",
        "[serve]",
        "[stages.NAME]",
        "[[policies]]",
    },
    "`[serve]`": set(config.ServeTable.model_fields),
    "`[serve.gateway]`": set(config.GatewayTable.model_fields),
    "`[ray]`": set(config.RayTable.model_fields),
    "`[ray.pools.NAME]`": set(config.RayPoolTable.model_fields),
    "`Backend`": {*inspect.signature(Backend).parameters, *config.BackendTable.model_fields},
    "`Cost`": names_of(Cost) | set(config.CostTable.model_fields),
    "`Limits` and `Limit`": names_of(Limits) | names_of(Limit),
    "`Hints`": names_of(Hints),
    "`WarmUp`": names_of(WarmUp),
    "`OrlaSaver`": set(inspect.signature(OrlaSaver.__init__).parameters) - {"self"},
}


@pytest.mark.parametrize("heading", KEYS)
def test_the_configuration_page_names_every_key_and_parameter(heading: str) -> None:
    assert not KEYS[heading] - first_cells("configuration.md", heading)


@pytest.mark.parametrize("heading", KEYS)
def test_the_configuration_page_names_nothing_that_is_gone(heading: str) -> None:
    rows = re.findall(r"^\| `(\w+)`", part_of("configuration.md", heading), re.M)
    assert rows
    assert not set(rows) - KEYS[heading]


def test_the_configuration_page_names_every_variable() -> None:
    sources = [*(ROOT / "orla_lg").rglob("*.py"), *(ROOT / "adapters" / "orla_lg_llamacpp").rglob("*.py")]
    read = {name for file in sources for name in re.findall(r'"(ORLA_[A-Z_]+)"', file.read_text(encoding="utf-8"))}
    assert read and not read - first_cells("configuration.md")


def test_the_records_page_names_every_field() -> None:
    assert not names_of(Record) - first_cells("records.md")


def leaves(parser: argparse.ArgumentParser, name: str = "orla-lg") -> Iterator[str]:
    below = [each for each in parser._actions if isinstance(each, argparse._SubParsersAction)]
    if not below:
        yield name
    for each in below:
        for word, command in each.choices.items():
            yield from leaves(command, f"{name} {word}")


def test_the_commands_page_names_every_command() -> None:
    named_there = first_cells("commands.md")
    for command in leaves(cli.parser()):
        _, *words = command.split()
        assert {command, " ".join(words), words[-1]} & named_there, command


def test_the_commands_page_names_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {f"{project['name']}[{extra}]" for extra in project["optional-dependencies"]}
    assert not extras - first_cells("commands.md", "Extras")
