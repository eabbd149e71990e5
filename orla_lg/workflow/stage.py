"""What a stage is: a name, a prompt made of what came before, and how its model calls are to be served."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from langchain_core.messages import BaseMessage, MessageLikeRepresentation
from langchain_core.tools import BaseTool
from pydantic import BaseModel

from orla_lg.arguments import answering
from orla_lg.core.call import NO_HINTS, CacheHint, Hints
from orla_lg.core.engine.backend import Backend
from orla_lg.errors import ConfigError, StageError, did_you_mean

Mode = Literal["single", "agent_loop"]
MODES: tuple[Mode, ...] = ("single", "agent_loop")
CACHE_HINTS: tuple[CacheHint, ...] = ("auto", "preserve", "flush")


@dataclass(frozen=True, slots=True)
class StageResult:
    """What a stage left behind."""

    stage: str
    messages: tuple[BaseMessage, ...]
    """The whole talk: what the builders made, the answers, the tools' words. A later stage that begins with these
    messages finds their KV cache, if it runs on the same backend."""
    parsed: Any = None
    """The answer as ``response_format`` has it: an object of the pydantic model, or JSON; ``None`` without one."""

    @property
    def message(self) -> BaseMessage:
        """The final answer, with its ``usage_metadata`` and its record in ``response_metadata["orla"]``."""
        return self.messages[-1]

    @property
    def text(self) -> str:
        """The final answer's text."""
        return str(self.message.text)


class Upstream(Mapping[str, StageResult]):
    """The results that a stage may read: of all stages before it, near and far, by name.

    A stage whose ``when`` said no has left none: ask ``"name" in upstream``. What runs beside a stage is not
    before it, even if it happens to be done.
    """

    def __init__(self, stage: str, results: Mapping[str, StageResult], before: Sequence[str]) -> None:
        self._stage = stage
        self._results = results
        self._before = before

    def __getitem__(self, name: str) -> StageResult:
        if name in self._results:
            return self._results[name]
        if name in self._before:
            raise KeyError(f"stage {name!r} was skipped: its `when` said no; ask `{name!r} in upstream` first")
        raise KeyError(f"stage {name!r} does not come before {self._stage!r}{did_you_mean(name, self._before)}")

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)


PromptBuilder = Callable[[Upstream, Any], str | Awaitable[str]]
"""``prompt(upstream, given)``: the text of one user message; *given* is what the workflow was started with."""
MessagesBuilder = Callable[
    [Upstream, Any], Sequence[MessageLikeRepresentation] | Awaitable[Sequence[MessageLikeRepresentation]]
]
"""``messages(upstream, given)``: all messages, as any LangChain model takes them."""
HintsBuilder = Callable[[Upstream, Any], Hints | Mapping[str, Any]]
"""``hints(upstream, given)``: called when the stage starts, in whichever thread or loop that is."""
Condition = Callable[[Upstream, Any], bool | Awaitable[bool]]
"""``when(upstream, given)``: whether the stage runs."""


@answering
@dataclass(frozen=True, eq=False)
class Stage:
    """One step of a ``Workflow``: a model call, or a loop of calls and tools.

    Wrong combinations are reported by ``Workflow.compile``, all at once.
    """

    name: str
    """What it is called in dependencies, mappings, records and in the graph, where it is a node."""
    backend: Backend | str | None = None
    """Where its calls run, before what the shared mapping says; ``None`` leaves it to that mapping."""
    prompt: PromptBuilder | None = field(default=None, kw_only=True)
    """Makes the prompt of what came before. Either this or ``messages``."""
    messages: MessagesBuilder | None = field(default=None, kw_only=True)
    mode: Mode = field(default="single", kw_only=True)
    """``agent_loop``: tools are run and told to the model until it asks for none."""
    tools: Sequence[BaseTool | Callable[..., Any]] = field(default=(), kw_only=True)
    max_turns: int = field(default=10, kw_only=True)
    """How many times the model may be asked in an agent loop; more is a ``StageError``."""
    response_format: type[BaseModel] | Mapping[str, Any] | None = field(default=None, kw_only=True)
    """What the answer must follow: a pydantic model, or a JSON schema (checked by the engine only)."""
    hints: Hints | HintsBuilder = field(default=NO_HINTS, kw_only=True)
    """Priority, deadline and tenant of its calls, fixed or computed. Weaker than ``orla.prioritize``."""
    cache: CacheHint = field(default="auto", kw_only=True)
    """``preserve`` keeps what the workflow cached elsewhere when this stage moves to another backend; ``flush``
    frees, when this stage is done, what the workflow cached where it ran; ``auto`` leaves it to ``Orla.memory``."""
    when: Condition | None = field(default=None, kw_only=True)
    """Whether it runs; a stage that does not leaves no result, and what needs it runs all the same."""
    temperature: float | None = field(default=None, kw_only=True)
    max_tokens: int | None = field(default=None, kw_only=True)
    """The bound on each answer, in tokens."""

    def faults(self) -> list[str]:
        """Return what is wrong with this stage by itself."""
        builders = (self.prompt is not None) + (self.messages is not None)
        wrong = {
            "it has neither a prompt nor a messages builder": builders == 0,
            "it has both a prompt and a messages builder; one of them makes the messages": builders == 2,
            f"mode {self.mode!r} is not one of {', '.join(map(repr, MODES))}": self.mode not in MODES,
            "its tools would never be run in mode 'single'; say mode='agent_loop'": (
                bool(self.tools) and self.mode == "single"
            ),
            f"max_turns must be at least 1, got {self.max_turns}": self.max_turns < 1,
            f"cache {self.cache!r} is not one of {', '.join(map(repr, CACHE_HINTS))}": self.cache not in CACHE_HINTS,
            f"hints must be Hints or a function that returns them, got {type(self.hints).__name__}": not (
                isinstance(self.hints, Hints) or callable(self.hints)
            ),
        }
        found = [fault for fault, so in wrong.items() if so]
        found += [
            f"its {name} must be a function of (upstream, given), got {type(function).__name__}"
            for name, function in (("prompt", self.prompt), ("messages", self.messages), ("when", self.when))
            if function is not None and not callable(function)
        ]
        return found

    def hints_for(self, upstream: Upstream, given: Any) -> Hints:
        """Return the hints for the calls of this stage.

        Raises:
            StageError: What its function said is none.
        """
        try:
            said = Hints.of(self.hints if isinstance(self.hints, Hints) else self.hints(upstream, given))
        except ConfigError as error:
            raise StageError(f"stage {self.name!r}: its hints: {error}") from error
        # Each call would flush; a stage flushes once, when it is done (``node``).
        return said.over(Hints(cache="preserve")) if self.cache == "preserve" else said
