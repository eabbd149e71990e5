"""The control client: what ``orla-lg top`` and its likes, or a script, ask a running process."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Self

from pydantic import ValidationError

from orla_lg.arguments import answering
from orla_lg.control import protocol
from orla_lg.control.protocol import ControlReply, Request
from orla_lg.control.state import ProcessState
from orla_lg.core.boundary.plain import is_path, shown
from orla_lg.errors import ConfigError

PATIENCE_S = 5.0

OPENING = """\
A process lets itself be watched once it has a control socket. Any of these opens one:

  ORLA_CONTROL=~/.cache/orla.sock python app.py     for one start, without a change
  control = "orla.sock"                             in orla.toml, beside it
  Orla(backends, control="orla.sock")               in code
"""


@answering
class ControlClient:
    """A connection to a running process. Closes at the end of its ``with`` block.

    Raises:
        ConfigError: No process serves there, or what answers is not orla_lg.
    """

    def __init__(self, path: str | Path, *, patience_s: float = PATIENCE_S) -> None:
        self._path = Path(path)
        self._patience_s = patience_s
        if not hasattr(socket, "AF_UNIX"):
            raise ConfigError("this platform has no Unix sockets, so no running process can be reached")
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(patience_s)
        try:
            if not is_path(self._path):
                raise OSError("there is a NUL or a lone surrogate in the path")
            self._socket.connect(str(self._path))
        except OSError as error:
            self._socket.close()
            fault = f"no running process at {shown(path)} ({error.strerror or error})"
            raise ConfigError(f"{fault}\n\n{OPENING}") from error
        self._lines = self._socket.makefile("rb")

    def ask(self, request: Request, *, extra_s: float | None = 0.0) -> ControlReply:
        """Ask, and return the answer.

        Args:
            request: What for.
            extra_s: How much longer than usual the answer may take, in seconds; ``None``: for ever.

        Raises:
            ConfigError: It was refused, with the process's reason; or no answer came.
        """
        self._socket.settimeout(None if extra_s is None else self._patience_s + extra_s)
        self._send(request)
        return self._answer()

    def state(self) -> ProcessState:
        """Return the state now."""
        return self._state(self.ask(protocol.Look()))

    def watch(self, interval_s: float) -> Iterator[ProcessState]:
        """Yield the state every *interval_s* seconds; ends when the process hangs up."""
        self._socket.settimeout(self._patience_s + interval_s)
        self._send(protocol.Watch(interval_s=interval_s))
        while (answer := self._next()) is not None:
            yield self._state(answer)

    def _state(self, answer: ControlReply) -> ProcessState:
        if answer.state is None:
            raise ConfigError(f"{self._path}: the answer has no state in it")
        return answer.state

    def _send(self, request: Request) -> None:
        with contextlib.suppress(BrokenPipeError):  # its reason may have come before it hung up
            self._socket.sendall(protocol.encode(request))

    def _answer(self) -> ControlReply:
        answer = self._next()
        if answer is None:
            raise ConfigError(f"{self._path}: the process hung up")
        return answer

    def _next(self) -> ControlReply | None:
        try:
            line = self._lines.readline()
        except TimeoutError:
            raise ConfigError(f"{self._path}: no answer in {self._socket.gettimeout()} s") from None
        except ConnectionError:
            return None
        if not line:
            return None
        try:
            answer = ControlReply.model_validate_json(line)
        except ValidationError as error:
            raise ConfigError(f"{self._path}: the answer is not one of orla_lg's") from error
        if not answer.ok:
            raise ConfigError(answer.error or f"{self._path}: refused")
        return answer

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


Client = ControlClient
"""Its name for scripts."""
