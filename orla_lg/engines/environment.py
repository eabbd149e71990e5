"""An engine's own Python environment in the user's cache folder, made with the user's own pip or uv.

An environment is finished when its marker is there, which is written last, after a check. Whatever lies
there without a marker was interrupted, and is thrown away: a package that an installer copied half would be
taken for whole by the next. The installers' own caches keep what was downloaded.

One process at a time holds the environment's lock. An installer inherits it: if we are killed, it stays held
until the installer has ended too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from orla_lg.engines.progress import Progress
from orla_lg.errors import EngineError
from orla_lg_llamacpp.model import cache_folder, find_uv, run_to_end, try_lock

__all__ = ["Environment", "InstallStep", "locked"]

POLL_S = 0.2
MARKER = "finished.json"
VENV = ("-m", "venv")
# Of an installer's settings, those that would send the packages elsewhere or bring in others.
NOT_OURS = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")
_NAME = re.compile(r"[A-Za-z0-9._-]+")


@dataclass(frozen=True, slots=True)
class InstallStep:
    """Something to be installed at one go."""

    title: str
    variants: tuple[tuple[str, ...], ...]
    """Requirements; those of the first variant that can be had are enough. One with an option is for uv alone."""
    alone: bool = False
    """Whether without what they depend on."""
    dependencies_of: str = ""
    """With what this distribution, installed before, depends on ..."""
    without: tuple[str, ...] = ()
    """... but not these."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What an engine's environment holds; ``ensure()`` makes it."""

    name: str
    """With the version: another version is another environment."""
    steps: tuple[InstallStep, ...]
    module: str
    """The module that must be importable in the end."""
    size_mb: int
    """What it takes on the disk when finished."""
    advice: str
    """What would be right if it cannot be installed."""

    @property
    def folder(self) -> Path:
        """Where it is; it belongs to one version of Python."""
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        return cache_folder() / "environments" / f"{self.name}-py{version}"

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")

    @property
    def packages(self) -> Path:
        """The folder of its packages."""
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / ("Lib" if sys.platform == "win32" else f"lib/{version}") / "site-packages"

    @property
    def finished(self) -> bool:
        """Whether it is there and whole, and its interpreter still is where it was."""
        return (self.folder / MARKER).is_file() and self.python.is_file()

    def ensure(self, progress: Progress) -> Path:
        """Return its interpreter, installing everything first if it is not finished.

        Raises:
            EngineError: It could not be installed; the message holds what the installer said.
        """
        if self.finished:
            return self.python
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with locked(self.folder, progress, "another process is installing it; waiting") as lock:
                if not self.finished:  # else another process has just made it
                    self._make(progress, lock)
        except OSError as exc:
            raise EngineError(
                f"the environment cannot be kept in {self.folder}: {exc}; free {self.size_mb:,} MB there, "
                "or set ORLA_CACHE_DIR to another folder"
            ) from exc
        finally:
            progress.end()
        return self.python

    def _make(self, progress: Progress, lock: int) -> None:
        _remove(self.folder)
        self._check_space()
        work = _Work(self.folder, self.packages, self.python, progress, lock)
        try:
            (self.folder / "tmp").mkdir(parents=True)
            progress.phase(f"{self.name}: an environment in {self.folder}")
            installers = work.create()
            for number, step in enumerate(self.steps, 1):
                progress.phase(f"{self.name}: {step.title} ({number} of {len(self.steps)})")
                self._install(step, installers, work)
            self._verify(work)
            _remove(self.folder / "tmp")
            self._mark()
        except BaseException:
            progress.phase(f"{self.name}: removing what is unfinished")
            _remove(self.folder)
            raise

    def _check_space(self) -> None:
        free_mb = shutil.disk_usage(self.folder.parent).free / 1e6
        if free_mb < self.size_mb * 1.3:  # the wheels lie there too while they are installed
            raise EngineError(
                f"{self.name} needs {self.size_mb * 1.3:,.0f} MB in {self.folder.parent}, {free_mb:,.0f} MB are "
                "free; make room there, or set ORLA_CACHE_DIR to another folder"
            )

    def _install(self, step: InstallStep, installers: list[_Installer], work: _Work) -> None:
        failures = []
        for variant in step.variants:
            wanted = (*variant, *_dependencies(step, self.packages))
            for installer in installers:
                if variant[0].startswith("--") and not installer.uv:
                    continue
                failure = work.run((*installer.install(self.python, alone=step.alone), *wanted))
                if failure is None:
                    return
                failures.append(f"{installer.name} said about {' '.join(variant)}:\n{failure}")
            if variant != step.variants[-1]:
                work.progress.phase(f"{self.name}: {' '.join(variant)} cannot be had; trying the next best")
        raise EngineError(f"{self.name} could not be installed. {self.advice}\n" + "\n".join(failures))

    def _verify(self, work: _Work) -> None:
        work.progress.phase(f"{self.name}: checking that it can be imported")
        if failure := work.run((str(self.python), "-c", f"import {self.module}")):
            raise EngineError(f"{self.name} was installed, but cannot be imported. {self.advice}\n{failure}")

    def _mark(self) -> None:
        staged = self.folder / f"{MARKER}.part"
        staged.write_text(json.dumps({"name": self.name, "python": sys.version}))
        staged.replace(self.folder / MARKER)


@dataclass(frozen=True, slots=True)
class _Installer:
    """The user's pip or uv."""

    name: str
    uv: str | None = None

    def install(self, python: Path, *, alone: bool) -> tuple[str, ...]:
        words: tuple[str, ...]
        if self.uv:
            words = (self.uv, "pip", "install", "--no-progress", "--python", str(python))
        else:
            quiet = ("--no-input", "--progress-bar=off", "--disable-pip-version-check")
            words = (str(python), "-m", "pip", "install", *quiet)
        return (*words, *(("--no-deps",) if alone else ()))


@dataclass(frozen=True, slots=True)
class _Work:
    """Commands run in an environment that is being made."""

    folder: Path
    packages: Path
    python: Path
    progress: Progress
    lock: int

    def create(self) -> list[_Installer]:
        """Make the empty environment; return the installers that can fill it."""
        here, uv = str(self.folder), find_uv()
        with_uv = [_Installer("uv", uv)] if uv else []
        ways: list[tuple[tuple[str, ...], list[_Installer]]]
        ways = [((sys.executable, *VENV, here), [_Installer("pip"), *with_uv])]
        if uv:  # first where the user has no pip; and some systems' Python comes without what venv needs
            way = ((uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, here), with_uv)
            ways.insert(1 if importlib.util.find_spec("pip") else 0, way)
        failures = []
        for command, installers in ways:
            failure = self.run(command)
            if failure is None:
                return installers
            failures.append(failure)
        raise EngineError(
            f"no environment could be made in {here}; `pip install uv`, or your system's package for Python's venv, "
            "would help:\n" + "\n".join(failures)
        )

    def run(self, command: tuple[str, ...]) -> str | None:
        log, began = self.folder / "tmp" / "log", time.time()
        inherited = () if sys.platform == "win32" else (self.lock,)
        return run_to_end(command, log, self._environment(), lambda: self._tell(log, began), inherited)

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in NOT_OURS}
        # Where we see downloads grow, and can remove them.
        return {**kept, **dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(self.folder / "tmp"))}

    def _tell(self, log: Path, began: float) -> None:
        said = log.read_text(errors="replace")
        if total := re.search(r"^Installing collected packages: (.*)$", said, re.M):
            new = [path for path in self.packages.glob("*.dist-info") if path.stat().st_ctime >= began]
            self.progress.detail(f"{len(new)} of {len(total[1].split(','))} packages written")
            return
        found = len(re.findall(r"^(?:Collecting|Downloading) ", said, re.M))
        fetched_mb = _bytes_below(self.folder / "tmp") / 1e6
        self.progress.detail(f"{found} packages found, {fetched_mb:,.0f} MB fetched" if found else "")


def _dependencies(step: InstallStep, packages: Path) -> list[str]:
    """Return what *step*'s distribution, as installed, says that it depends on."""
    if not step.dependencies_of:
        return []
    found = importlib.metadata.Distribution.discover(name=step.dependencies_of, path=[str(packages)])
    requirements = [requirement for distribution in found for requirement in distribution.requires or []]
    return [line for line in requirements if "extra ==" not in line and _project(line) not in step.without]


def _project(requirement: str) -> str:
    match = _NAME.match(requirement)
    return match[0].lower() if match else ""


def _bytes_below(folder: Path) -> int:
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # removed between listing and looking
                total += os.lstat(f"{where}/{name}").st_size
    return total


def _remove(folder: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / MARKER).unlink()  # first: half removed must not look finished
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def locked(folder: Path, progress: Progress, waiting: str) -> Iterator[int]:
    """Hold the lock of a folder that is being made; yield its descriptor."""
    with folder.with_name(f"{folder.name}.lock").open("w") as lock:
        while not try_lock(lock):
            progress.phase(f"{folder.name}: {waiting}")
            progress.detail("")
            time.sleep(POLL_S)
        yield lock.fileno()
