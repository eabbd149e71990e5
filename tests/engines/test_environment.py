"""An environment is made with the user's installer, whole or not at all, by one process at a time."""

from __future__ import annotations

import dataclasses
import http.server
import importlib.util
import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from orla_lg.engines import environment
from orla_lg.engines.environment import Environment, InstallStep
from orla_lg.engines.progress import Progress
from orla_lg.errors import EngineError

LIMIT_S = 60.0
TINY = Environment(
    name="tiny-1.0",
    steps=(
        InstallStep("the engine", (("orla-tiny==9.9",), ("orla-tiny==1.0",)), alone=True),
        InstallStep("what it depends on", (("orla-more",),), dependencies_of="orla-tiny", without=("torchvision",)),
    ),
    module="orla_tiny",
    size_mb=1,
    advice="ADVICE",
)


def write_wheel(simple: Path, name: str, *requires: str) -> None:
    module, file = name.replace("-", "_"), f"{name.replace('-', '_')}-1.0-py3-none-any.whl"
    info = f"{module}-1.0.dist-info"
    needs = "".join(f"Requires-Dist: {requirement}\n" for requirement in requires)
    files = {
        f"{module}.py": "",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{needs}",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    (simple / name).mkdir()
    with zipfile.ZipFile(simple / name / file, "w") as archive:
        for path, content in files.items():
            archive.writestr(path, content)
    (simple / name / "index.html").write_text(f'<a href="{file}">{file}</a>')


class Index(http.server.SimpleHTTPRequestHandler):
    """An index that can be told not to answer."""

    open: threading.Event
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        self.open.wait(LIMIT_S)
        super().do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Index]]:
    """The only index that pip and uv are set up with, and a cache folder of the test's own."""
    simple = tmp_path / "index" / "simple"
    simple.mkdir(parents=True)
    write_wheel(simple, "orla-tiny", "orla-needed", "torchvision", "orla-extra; extra == 'more'")
    write_wheel(simple, "orla-needed")
    write_wheel(simple, "orla-more")
    handler = type("Handler", (Index,), {"open": threading.Event(), "asked": []})
    handler.open.set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(handler, directory=str(tmp_path / "index")))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/simple"
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_FIND_LINKS"):
        monkeypatch.delenv(name, raising=False)
    own = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": url, "UV_NO_CONFIG": "1", "UV_DEFAULT_INDEX": url}
    own |= {"PIP_RETRIES": "0", "UV_HTTP_RETRIES": "0", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    own |= {"ORLA_CACHE_DIR": str(tmp_path / "cache"), "UV_CACHE_DIR": str(tmp_path / "uv"), "PIP_NO_CACHE_DIR": "1"}
    # These would send pip elsewhere, if they reached it.
    own |= {"PIP_TARGET": str(tmp_path / "elsewhere"), "PIP_USER": "1", "PYTHONPATH": str(tmp_path)}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    yield handler
    handler.open.set()
    server.shutdown()
    server.server_close()


@pytest.fixture
def only_uv(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without what venv needs; uv is quicker, too."""
    if environment.find_uv() is None:
        pytest.skip("uv is not installed")
    monkeypatch.setattr(environment, "VENV", ("-c", "raise SystemExit('ensurepip is not available')"))


def ensure(wanted: Environment = TINY) -> str:
    """Make the environment; return what was told meanwhile."""
    told = io.StringIO()
    assert wanted.ensure(Progress(told)) == wanted.python
    return told.getvalue()


def packages(wanted: Environment = TINY) -> set[str]:
    return {path.name.partition("-")[0] for path in wanted.packages.glob("orla_*.dist-info")}


def left() -> set[str]:
    """Return what is in the folder of environments, apart from the lock."""
    return {path.name for path in TINY.folder.parent.iterdir()} - {f"{TINY.folder.name}.lock"}


def test_pip_fills_it_and_the_next_time_nothing_is_asked(index: type[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_uv", lambda: None)
    told = ensure()
    assert packages() == {"orla_tiny", "orla_needed", "orla_more"}  # not the extra's, not what to do without
    assert "tiny-1.0: the engine (1 of 2)" in told
    assert "orla-tiny==9.9 cannot be had; trying the next best" in told
    index.asked.clear()
    assert ensure() == ""
    assert index.asked == []
    assert not (TINY.folder / "tmp").exists()


@pytest.mark.usefixtures("only_uv")
def test_uv_fills_it_where_venv_cannot(index: type[Index]) -> None:
    ensure()
    assert packages() == {"orla_tiny", "orla_needed", "orla_more"}


@pytest.mark.skipif(environment.find_uv() is None, reason="uv is not installed")
def test_uv_fills_it_for_who_has_no_pip(index: type[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    ensure()
    assert packages() == {"orla_tiny", "orla_needed", "orla_more"}
    assert not (TINY.packages / "pip").exists()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_a_variant_with_an_option_is_for_uv_alone(
    index: type[Index], installer: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    asked: list[str] = []
    real = environment.run_to_end
    monkeypatch.setattr(
        environment, "run_to_end", lambda words, *more: (asked.append(" ".join(words)), real(words, *more))[1]
    )
    if installer == "uv":
        request.getfixturevalue("only_uv")
    else:
        monkeypatch.setattr(environment, "find_uv", lambda: None)
    step = InstallStep("it", (("--torch-backend=cpu", "orla-tiny==1.0"), ("orla-more",)), alone=True)
    ensure(dataclasses.replace(TINY, steps=(step,), module="sys"))
    assert packages() == {"orla_tiny" if installer == "uv" else "orla_more"}
    assert any("--torch-backend=cpu" in words for words in asked) == (installer == "uv")


@pytest.mark.usefixtures("only_uv")
def test_without_marker_or_interpreter_it_is_made_anew(index: type[Index]) -> None:
    ensure()
    (TINY.folder / environment.MARKER).unlink()
    (TINY.packages / "orla_tiny.py").unlink()  # it may be a link into uv's cache
    (TINY.packages / "orla_tiny.py").write_text("raise ImportError('half copied')")
    ensure()
    TINY.python.unlink()
    TINY.python.symlink_to("/no/such/python")
    ensure()
    assert subprocess.run([TINY.python, "-c", "import orla_tiny"]).returncode == 0


# In a process of its own, which is interrupted as a user would.
MAKE = """
import signal, sys
from orla_lg.engines.progress import Progress
from tests.engines.test_environment import TINY
def interrupt(*_): raise KeyboardInterrupt
signal.signal(signal.SIGINT, interrupt)
try:
    TINY.ensure(Progress())
except KeyboardInterrupt:
    sys.exit(130)
"""


def make_elsewhere() -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])
    return subprocess.Popen([sys.executable, "-c", MAKE], env={**os.environ, "PYTHONPATH": path})


def until_asked(index: type[Index]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not index.asked:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def installers() -> list[str]:
    """Return the command lines of the installers at work in the environment."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if str(TINY.folder) in " ".join(words) and "install" in words:
            found.append(" ".join(words))
    return found


@pytest.mark.usefixtures("only_uv")  # for the repetition; what is interrupted and killed is pip
def test_interrupted_it_leaves_nothing_and_can_be_repeated(index: type[Index]) -> None:
    index.open.clear()
    maker = make_elsewhere()
    until_asked(index)
    assert installers()
    maker.send_signal(signal.SIGINT)
    assert maker.wait(LIMIT_S) == 130
    assert (installers(), left()) == ([], set())
    index.open.set()
    ensure()
    assert packages() == {"orla_tiny", "orla_needed", "orla_more"}


@pytest.mark.usefixtures("only_uv")
def test_killed_it_is_made_anew_once_its_installer_has_ended(index: type[Index]) -> None:
    index.open.clear()
    maker = make_elsewhere()
    until_asked(index)
    maker.kill()
    maker.wait()
    assert installers(), "the installer outlives us"
    with ThreadPoolExecutor(1) as threads:
        told = threads.submit(ensure)
        time.sleep(0.5)
        assert not told.done()
        index.open.set()
        assert "another process is installing it; waiting" in told.result(LIMIT_S)
    assert packages() == {"orla_tiny", "orla_needed", "orla_more"}


@pytest.mark.usefixtures("only_uv")
def test_of_several_at_once_one_makes_it(index: type[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Path] = []
    real = Environment._make
    monkeypatch.setattr(Environment, "_make", lambda self, *args: (made.append(self.folder), real(self, *args)))
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(lambda _: ensure(), range(3)))
    assert made == [TINY.folder]


@pytest.mark.usefixtures("only_uv")
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"steps": (InstallStep("it", (("orla-absent==2",), ("orla-absent==1",))),)},
            r"ADVICE(.|\n)*uv said about orla-absent",
        ),
        ({"module": "orla_absent"}, r"cannot be imported. ADVICE(.|\n)*No module named 'orla_absent'"),
    ],
)
def test_what_fails_is_told_and_leaves_nothing(index: type[Index], changes: dict[str, object], said: str) -> None:
    with pytest.raises(EngineError, match=said):
        ensure(dataclasses.replace(TINY, **changes))  # type: ignore[arg-type]
    assert left() == set()


def test_pip_is_quoted(index: type[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_uv", lambda: None)
    wanted = dataclasses.replace(TINY, steps=(InstallStep("it", (("orla-absent==2",),)),))
    with pytest.raises(EngineError, match=r"pip said about orla-absent==2:\n(.|\n)*No matching distribution"):
        ensure(wanted)


def test_too_little_space_is_told_before_anything_is_done(
    index: type[Index], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")._replace(free=1_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(EngineError, match=r"needs 4,420 MB in .*, 1 MB are free.*ORLA_CACHE_DIR"):
        ensure(dataclasses.replace(TINY, size_mb=3400))
    assert index.asked == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ORLA_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(EngineError, match=r"cannot be kept in .*set ORLA_CACHE_DIR"):
        ensure()


def test_neither_venv_nor_uv(index: type[Index], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "VENV", ("-c", "raise SystemExit('ensurepip is not available')"))
    monkeypatch.setattr(environment, "find_uv", lambda: None)
    with pytest.raises(EngineError, match=r"`pip install uv`(.|\n)*ensurepip is not available"):
        ensure()
    assert left() == set()


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_progress_without_a_terminal_has_a_line_for_a_phase_and_one_every_ten_seconds() -> None:
    out, clock = io.StringIO(), Clock()
    progress = Progress(out, clock)
    progress.phase("one")
    for _ in range(24):
        clock.now += 1
        progress.phase("one")
        progress.detail("more")
    progress.phase("two")
    assert out.getvalue().splitlines() == ["[   0 s] one", "[  10 s] one: more", "[  20 s] one: more", "[  24 s] two"]


def test_progress_on_a_terminal_rewrites_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    out, clock = io.StringIO(), Clock()
    monkeypatch.setattr(out, "isatty", lambda: True)
    progress = Progress(out, clock)
    progress.phase("one")
    clock.now += 1
    progress.detail("more")
    progress.end()
    assert [line.rstrip() for line in out.getvalue().split("\r")] == ["", "[   0 s] one", "[   1 s] one: more"]
    assert out.getvalue().endswith("\n")
