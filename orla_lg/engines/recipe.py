"""What a user may ask of an engine, and what each kind of engine must know how to do."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from orla_lg.engines.progress import Progress
from orla_lg.errors import EngineError

__all__ = ["SMOLLM2", "EngineOptions", "Place", "Recipe", "Served"]

SMOLLM2 = "smollm2"


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How an engine is started. None leaves a choice to the engine's recipe."""

    engine: str = "llamacpp"
    model: str = SMOLLM2
    """A model that the recipe knows by name, or a path."""
    name: str | None = None
    """The model's name in requests. None: that of the model."""
    port: int = 0
    """0: a free one."""
    kv_tokens: int | None = None
    """What the KV cache holds, all requests together."""
    context_tokens: int | None = None
    """Per request, prompt and answer together."""
    slots: int | None = None
    """Requests served at once."""
    threads: int | None = None
    """None: one for each core that this process may use."""
    plugin: bool = False
    """With orla_lg's plugin inside, for an engine that there is one for."""
    kv_events: bool = False
    """Telling what its cache takes up and gives up, for an engine that can (``Running.kv_events`` says where)."""
    flags: tuple[str, ...] = ()
    """The engine's own command-line flags, added at the end."""

    def __post_init__(self) -> None:
        for field in ("kv_tokens", "context_tokens", "slots", "threads"):
            count = getattr(self, field)
            if count is not None and count < 1:
                raise EngineError(f"EngineOptions.{field} is {count}; it must be 1 or more")

    def settled(self, **changes: str | int | None) -> EngineOptions:
        """Return a copy with what was left open decided; the model's path made whole."""
        path = Path(self.model).expanduser()
        model = str(path.absolute()) if path.exists() else self.model
        name = self.name or (path.name.removesuffix(".gguf") if path.exists() else self.model)
        return dataclasses.replace(self, model=model, name=name, **changes)  # type: ignore[arg-type]

    def words(self) -> list[str]:
        """Return the command line that stands for these options."""
        given = {
            "--model": self.model,
            "--name": self.name,
            "--port": self.port or None,
            "--kv-tokens": self.kv_tokens,
            "--context-tokens": self.context_tokens,
            "--slots": self.slots,
            "--threads": self.threads,
        }
        options = [f"{option}={value}" for option, value in given.items() if value is not None]
        switches = {"--plugin": self.plugin, "--kv-events": self.kv_events}
        on = [switch for switch, is_on in switches.items() if is_on]
        return [self.engine, *options, *on, *(("--", *self.flags) if self.flags else ())]


@dataclass(frozen=True, slots=True)
class Place:
    """Where an engine is to run."""

    port: int
    log: Path
    """The file for what the engine says."""
    lock: int
    """The descriptor of its run file's lock, for its process to inherit."""


@dataclass(frozen=True, slots=True)
class Served:
    """An engine's process, as its recipe started it."""

    pid: int
    group: int
    """The process group that holds it and all that it starts; 0 if it has none of its own."""
    poll: Callable[[], int | None]
    """Returns None while it runs, then its exit status, as ``subprocess.Popen.poll``."""
    kv_events: str = ""
    """Where it publishes its cache events (ZeroMQ); empty if it does not."""
    kv_replay: str = ""
    """Where it repeats them."""


class Recipe(Protocol):
    """One kind of engine."""

    adapter: str
    """The value of ``engine`` in orla.toml."""
    ready_timeout_s: float

    def prepare(self, options: EngineOptions, progress: Progress) -> EngineOptions:
        """Install and fetch what is missing; return the options with every choice made."""

    def serve(self, options: EngineOptions, place: Place) -> AbstractContextManager[Served]:
        """Run the engine inside the ``with`` block; at its end nothing of it is left."""

    def phase(self, said: str) -> str:
        """Say what a starting engine is doing, by its log so far."""

    def load(self, root: str) -> str:
        """Say how busy the engine at *root* is; httpx's errors are the caller's."""
