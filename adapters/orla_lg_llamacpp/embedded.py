"""llama.cpp's own server inside this Python process, on a loopback port.

The start is ordinary. The end is not: destroying the server while a request is open waits for that request's
client, holding the interpreter's lock, so a client in this process would never get to leave. ``_hang_up``
therefore closes the connections first.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import secrets
import signal
import socket
import stat
import sys
import tempfile
import time
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from orla_lg.errors import EngineError
from orla_lg_llamacpp.adapter import SAVED_IN, STARTED
from orla_lg_llamacpp.model import Report, ensure_model

__all__ = ["EmbeddedEngine", "EngineSettings", "check_port", "free_port", "usable_cores"]

HOST = "127.0.0.1"
GGUF_MAGIC = b"GGUF"
HANG_UP_TIMEOUT_S = 10.0
HANG_UP_POLL_S = 0.02

# llama.cpp's log threshold, which goes to stderr and is one for the whole process.
SILENT, ERRORS = 0, 1


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """How an embedded engine is started; ``EngineSettings()`` serves the demo's model to four at a time."""

    slots: int = 4
    """Sequences served at once, each with a KV cache of its own."""
    context_tokens: int = 4096
    """Per slot: prompt and answer together."""
    threads: int | None = None
    """None: every core this process may use."""
    port: int = 0
    """0: a free one."""
    # While a batch of another request's prompt runs, nobody gets a token. On two CPU cores a short call that
    # meets two long prompts waits 0.4 s with 128 and 1.1 s with 256; the prompts run no faster for it.
    batch_tokens: int = 128
    name: str = "smollm2"
    """The model's name in requests."""
    model_path: Path | None = None
    """None: the demo's model, fetched if need be."""
    cache_ram_mib: int = 0
    """Idle slots' copies in RAM. 0, because a slot erased would live on in them."""
    save_dir: Path | None = None
    """Where slots are saved. None: a folder that goes away with the engine."""
    log_errors: bool = False
    """Whether llama.cpp reports what fails on stderr; its clients are told in any case."""

    def __post_init__(self) -> None:
        for field in ("slots", "context_tokens", "threads", "batch_tokens"):
            count = getattr(self, field)
            if count is not None and count < 1:
                raise EngineError(f"EngineSettings.{field} is {count}; it must be 1 or more")
        if not 0 <= self.port <= 65_535:
            raise EngineError(f"EngineSettings.port is {self.port}; it must be 0 (a free one) to 65535")


class EmbeddedEngine:
    """A llama.cpp server in this process, from construction to ``close()``.

    Several may run side by side. ``report`` hears of the model's download, if there is one.

    Raises:
        EngineError: xllamacpp or the model is missing, the file is not a model, or the port is taken.
    """

    def __init__(self, settings: EngineSettings | None = None, report: Report | None = None) -> None:
        self.settings = settings or EngineSettings()
        xllamacpp = _import_xllamacpp()
        model = self.settings.model_path or ensure_model(report)
        _check_gguf(model)
        check_port(self.settings.port)
        save_dir, temporary = self.settings.save_dir, None
        if save_dir is None:
            temporary = tempfile.TemporaryDirectory(prefix="orla-lg-slots-")  # its user's alone
            save_dir = Path(temporary.name)
        try:
            # Slots hold prompts, and llama.cpp writes them for everybody to read: the folder keeps others out.
            save_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            server = _start(xllamacpp, self.settings, model, save_dir)
        except BaseException:
            if temporary is not None:
                temporary.cleanup()
            raise
        self._root = server.listening_address
        # The list holds the only reference; a finalizer runs once: at close(), when dropped, or at exit.
        self._finalizer = weakref.finalize(self, _close, [server], urlsplit(self._root).port, temporary)

    @property
    def url(self) -> str:
        """The OpenAI API's base URL."""
        return f"{self._root}/v1"

    @property
    def port(self) -> int:
        """The port it listens on."""
        return urlsplit(self._root).port or 0

    @property
    def name(self) -> str:
        """The model's name in requests."""
        return self.settings.name

    @property
    def closed(self) -> bool:
        """Whether it was closed."""
        return not self._finalizer.alive

    def close(self) -> None:
        """Hang up on whoever is still connected and end the server; a second call does nothing."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"EmbeddedEngine({self.name!r}, {'closed' if self.closed else self.url})"


def free_port() -> int:
    """Return a loopback port that nobody listened on just now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


# Starting -------------------------------------------------------------------------------------------------


def _import_xllamacpp() -> Any:
    try:
        return importlib.import_module("xllamacpp")
    except ImportError as exc:
        raise EngineError(
            f"the embedded engine needs xllamacpp, which cannot be imported ({exc}); "
            "it comes with `pip install 'orla-lg[demo]'`"
        ) from exc


def _check_gguf(model: Path) -> None:
    try:
        with model.open("rb") as file:
            magic = file.read(len(GGUF_MAGIC))
    except OSError as exc:
        raise EngineError(f"the model file {model} cannot be read: {exc.strerror}") from exc
    if magic != GGUF_MAGIC:
        raise EngineError(f"{model} is not a GGUF model: it begins with {magic!r} instead of {GGUF_MAGIC!r}")


def check_port(port: int) -> None:
    """Raise EngineError if nothing can listen on *port*: engines find out after loading, and say it badly."""
    with socket.socket() as probe:
        # As the server does: a port whose last connections linger (TIME_WAIT) is free.
        if sys.platform != "win32":
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as exc:
            raise EngineError(
                f"port {port} on {HOST} cannot be had: {exc.strerror}; name another, or 0 for a free one"
            ) from exc


def _start(xllamacpp: Any, settings: EngineSettings, model: Path, save_dir: Path) -> Any:
    params = _params(xllamacpp, settings, model, save_dir)
    with _signals_stay_ours():
        try:
            return xllamacpp.Server(params)
        except RuntimeError:
            # It does not say why; so once more, aloud.
            params.verbosity = ERRORS
            try:
                return xllamacpp.Server(params)
            except RuntimeError as exc:
                raise EngineError(
                    f"llama.cpp could not start with {model}: {exc} Its own lines on stderr say why; "
                    f"asked for were {settings.slots} slots of {settings.context_tokens} tokens"
                ) from exc


def _params(xllamacpp: Any, settings: EngineSettings, model: Path, save_dir: Path) -> Any:
    params = xllamacpp.CommonParams()
    params.model.path = str(model)
    params.model_alias = {settings.name}
    params.hostnames = [HOST]
    params.port = settings.port
    params.n_parallel = settings.slots
    params.n_ctx = settings.slots * settings.context_tokens
    params.n_batch = params.n_ubatch = settings.batch_tokens
    threads = settings.threads or len(usable_cores())
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    # Each slot owns its cache, and nothing outlives an erased slot: what the memory manager relies on.
    params.kv_unified = False
    params.cache_ram_mib = settings.cache_ram_mib
    params.cache_idle_slots = settings.cache_ram_mib != 0
    params.slot_save_path = f"{save_dir}{os.sep}"  # a plain prefix: without the slash, names grow onto it
    params.endpoint_slots = params.endpoint_props = params.endpoint_metrics = True
    params.use_jinja = True
    params.ui = False
    # What the server draws at random itself is one for the whole process, in which it may be started again.
    params.ui_config_json = json.dumps({STARTED: secrets.token_hex(8), SAVED_IN: str(save_dir)})
    params.fit_params = False  # it would load the model twice, and may give less context than was asked for
    params.verbosity = ERRORS if settings.log_errors else SILENT
    return params


def usable_cores() -> list[int]:
    """Return the numbers of the cores that this process may use."""
    if sys.platform != "linux":
        return list(range(os.cpu_count() or 1))
    return sorted(os.sched_getaffinity(0))


@contextlib.contextmanager
def _signals_stay_ours() -> Iterator[None]:
    """Have the server's threads born with signals blocked, so that each reaches Python's main thread."""
    if sys.platform == "win32":
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# Closing --------------------------------------------------------------------------------------------------


def _close(holder: list[Any], port: int, temporary: tempfile.TemporaryDirectory[str] | None) -> None:
    _hang_up(port)
    holder.clear()
    if temporary is not None:
        temporary.cleanup()


def _hang_up(port: int) -> None:
    """Close the server's connections from this end, until it has let go of the last request."""
    deadline = time.monotonic() + HANG_UP_TIMEOUT_S
    while _shut_connections(port) and time.monotonic() < deadline:
        time.sleep(HANG_UP_POLL_S)


def _shut_connections(port: int) -> int:
    """Shut every connection accepted on *port* and return how many there were.

    The server is in this process, so its sockets are among our descriptors; those that are connected and
    whose near end is the port are its side. Where descriptors cannot be listed (Windows), there are none.
    """
    found = 0
    for descriptor in _descriptors():
        with contextlib.suppress(OSError):  # not a socket, not connected, or closed since we listed it
            if not stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                continue
            with socket.socket(fileno=os.dup(descriptor)) as near_end:
                if near_end.getsockname() == (HOST, port) and near_end.getpeername():
                    found += 1
                    near_end.shutdown(socket.SHUT_RDWR)
    return found


def _descriptors() -> list[int]:
    try:
        return [int(name) for name in os.listdir("/dev/fd")]  # noqa: PTH208  names, not paths
    except OSError:
        return []
