"""From the wheel alone, in an empty environment of pip or uv, with whatever package index the user has set up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command in a folder that has nothing of the project, and return what it printed."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=kept, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_all_packages_and_the_demos_data(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for module in ("orla_lg/orla.py", "orla_lg/py.typed", "orla_lg_llamacpp/adapter.py", "orla_lg/demo/graph.py"):
        assert module in names
    assert any(name.startswith("orla_lg/demo/data/") for name in names)
    page = ROOT / "orla_lg" / "serve" / "page" / "static"
    assert {f"orla_lg/serve/page/static/{file.name}" for file in page.iterdir()} <= names
    assert not any(name.startswith(("tests/", "bench/", "adapters/", "examples/")) for name in names)


def with_pip(folder: Path, wheel: Path) -> Path:
    run(sys.executable, "-m", "venv", folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-compile", f"{wheel}[demo]", cwd=folder)
    return python.parent


def with_uv(folder: Path, wheel: Path) -> Path:
    uv = shutil.which("uv", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if uv is None:
        pytest.skip("uv is not installed; `pip install uv` would let this run")
    run(uv, "venv", "--quiet", "--python", sys.executable, folder / "env", cwd=folder)
    python = folder / "env" / "bin" / "python"
    run(uv, "pip", "install", "--quiet", "--python", python, f"{wheel}[demo]", cwd=folder)
    return python.parent


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize("install", [with_pip, with_uv])
def test_the_demo_runs_from_an_empty_environment(
    wheel: Path, tmp_path: Path, install: Callable[[Path, Path], Path]
) -> None:
    programs = install(tmp_path, wheel)
    assert run(programs / "orla-lg", "--version", cwd=tmp_path).startswith("orla-lg ")
    printed = run(
        programs / "orla-lg",
        "demo",
        "-n",
        "1",
        "--arms",
        "wrapped",
        "--plain",
        "--outbox",
        tmp_path / "outbox",
        cwd=tmp_path,
    )
    assert "classify" in printed
    assert "reply" in printed
