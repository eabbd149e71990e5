"""The prompts that warm-ups are made of: the last one of each workflow, and what those of a stage begin with.

Nothing else in the core keeps what users write, so this is bounded twice over: in characters, and in time. A
workflow's last prompt goes when the workflow is over or its thread is deleted; of a stage only that is kept which the
calls of different workflows had in common: what the graph's author wrote. None of it is ever logged or stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import CHARS_PER_TOKEN, Ask, Call, Usage, in_common
from orla_lg.core.engine.backend import with_fields
from orla_lg.core.engine.capabilities import Warmable, Warmed
from orla_lg.core.memory.events import SplitPrompt

K = TypeVar("K")

AGREED = 2
"""What a stage's prompt begins with counts as certain once so many calls of further workflows began the same."""

AGAIN_AFTER = 64
"""An engine that refused the beginning of a stage is asked again after so many calls more."""

KEEP_STAGES = 1000

BEGINNINGS_SHARE = 0.25
"""Of the characters that may be kept, for the beginnings of stages."""

_ANSWER_ONLY = frozenset(
    {
        "stream", "stream_options", "max_tokens", "max_completion_tokens", "n", "stop", "seed", "temperature",
        "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "logprobs", "top_logprobs",
        "user", "store", "metadata", "prediction", "service_tier", "response_format",
    }
)  # fmt: skip
"""Fields that steer the answer and leave the prompt as it is; any other may change how an engine renders it."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """A request as far as it shapes what the engine prefills."""

    call_id: str
    """Of the call that sent it."""
    graph: str
    stage: str
    ask: Ask = field(repr=False)
    """Its hashes were computed before it was sent; its list of messages may have grown since."""
    body: Mapping[str, Any] = field(repr=False)
    """``messages``, ``tools``, ``model`` and whatever else an engine may render."""
    chars: int = 0
    """The length of all its text, tool schemas and images included."""
    tokens: int = 0
    """As the engine counted them, else by length."""
    base: Prompt | None = field(default=None, repr=False)
    """What the call itself sent, where this is what follows on its answer."""
    partly: bool = False
    """Its last message goes on."""

    @property
    def whole(self) -> tuple[int, ...]:
        """The chained hashes of the messages that are whole: every prompt that it is the beginning of has them."""
        return self.ask.prefix[:-1] if self.partly else self.ask.prefix

    @property
    def frame(self) -> dict[str, Any]:
        """The body without its messages."""
        return {name: value for name, value in self.body.items() if name != "messages"}

    def counted(self, usage: Usage | None) -> Prompt:
        """Return it with the tokens that the engine counted."""
        return self if usage is None or not usage.prompt_tokens else replace(self, tokens=usage.prompt_tokens)

    def beginning(self, messages: int) -> Prompt:
        """Return its first *messages* messages as a prompt."""
        kept = list(self.body["messages"][:messages])
        body = {**self.body, "messages": kept}
        chars = _chars(body)
        ask = replace(self.ask, messages=kept)
        return replace(self, ask=ask, body=body, chars=chars, tokens=self.scaled(chars))

    def elsewhere(self, backend: str, model: str) -> Prompt:
        """Return it as it would be sent to another backend, by the name that the model has there."""
        return replace(self, body={**self.body, "model": model}, base=None)

    def extended(self, messages: Sequence[Any]) -> Prompt:
        """Return the prompt after its call, as far as it is certain: its own messages, and then *messages*."""
        root = self.base or self
        body = {**root.body, "messages": [*root.body["messages"], *messages]}
        chars = root.chars + _chars(messages)
        ask = replace(root.ask, messages=body["messages"])
        return replace(root, ask=ask, body=body, chars=chars, tokens=root.scaled(chars), base=root)

    def scaled(self, chars: int) -> int:
        """Return how many tokens a prompt of so many characters has that is written like this one."""
        return round(self.tokens * chars / max(1, self.chars))

    async def warm(self, adapter: Warmable, fields: Mapping[str, Any]) -> Warmed:
        """Have the engine prefill it, in a request with the adapter's *fields*; cancelling this ends that."""
        return await adapter.warm(with_fields(self.body, fields))


def prompt_of(call: Call, body: Mapping[str, Any]) -> Prompt:
    """Return what shapes the prompt of a request.

    Args:
        call: The call that sends it.
        body: As it goes to the engine, but without what is decided for each call (slot, session, priority).
    """
    messages = list(body.get("messages") or ())  # the caller may go on with its list
    kept = {name: value for name, value in body.items() if name not in _ANSWER_ONLY} | {"messages": messages}
    chars = _chars(kept)
    return Prompt(call.id, call.standing.graph, call.identity.stage, call.ask, kept, chars, chars // CHARS_PER_TOKEN)


def _chars(value: Any) -> int:
    """Return the length of all text in a value of JSON's kind."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, Mapping):
        return sum(len(str(name)) + _chars(each) for name, each in value.items())
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return sum(_chars(each) for each in value)
    return 0


@dataclass(frozen=True, slots=True)
class SplitStatistics:
    """Predictions of next prompts at one moment."""

    predicted: int = 0
    """Next prompts that came after a prediction."""
    held: int = 0
    """Of these, how many began as predicted."""
    stopped: dict[str, str] = field(default_factory=dict)
    """Stages that are left alone, as ``graph/stage``, and why."""


class PromptStore(Generic[K]):
    """Prompts by key, the newest last; those put there longest ago go when there are too many characters."""

    def __init__(self, keep_chars: int) -> None:
        self.chars = 0
        self._keep_chars = keep_chars
        self._prompts: OrderedDict[K, Prompt] = OrderedDict()

    def put(self, key: K, prompt: Prompt) -> None:
        """Keep a prompt in the place of the one before; one that is too long alone is not kept."""
        self.take(key)
        if prompt.chars > self._keep_chars:
            return
        self._prompts[key] = prompt
        self.chars += prompt.chars
        while self.chars > self._keep_chars:
            self.take(next(iter(self._prompts)))

    def get(self, key: K) -> Prompt | None:
        """Return what is kept."""
        return self._prompts.get(key)

    def newest(self) -> Iterator[Prompt]:
        """Yield the prompts, the newest first."""
        return reversed(self._prompts.values())

    def take(self, key: K) -> None:
        """Drop what is kept for a key."""
        if (gone := self._prompts.pop(key, None)) is not None:
            self.chars -= gone.chars

    def __len__(self) -> int:
        return len(self._prompts)


_Stage = tuple[str, str, str]
"""Graph, stage, and the scope of its prompts."""

Key = str | tuple[str, tuple[str, str]]
"""A workflow: its last prompt. With a stage (graph and name): what is certain of that stage's next one."""


@dataclass(eq=False, slots=True)
class _Seen:
    """What the calls of a stage had in common so far. Of its first call only hashes are kept."""

    prefix: tuple[int, ...]
    frame: dict[str, Any]
    workflow: str
    """Of the last call: its own next one begins the same, and shows nothing."""
    agreed: int = 0


class PromptBook:
    """What is kept of one backend's prompts. Under the backend's lock.

    What stages begin with is kept by scope (``Ask.scope``): where tenants are isolated, none is sent what only the
    calls of another one began with.

    Args:
        keep_chars: How many characters, in all.
    """

    def __init__(self, keep_chars: int) -> None:
        self.last = PromptStore[Key](keep_chars - int(BEGINNINGS_SHARE * keep_chars))
        """By workflow; and beside them what is certain of next ones."""
        self.split = set[tuple[str, tuple[str, str]]]()
        """The keys of those; they may be gone, for want of room."""
        self._beginnings = PromptStore[_Stage](int(BEGINNINGS_SHARE * keep_chars))
        self._seen = BoundedDict[_Stage, _Seen](KEEP_STAGES)
        self._declined = BoundedDict[tuple[str, str], int](KEEP_STAGES)
        """Stages of which the engine refused a next prompt, and how often none is kept for that."""

    @property
    def chars(self) -> int:
        """How many characters are kept."""
        return self.last.chars + self._beginnings.chars

    def learn(self, workflow: str, prompt: Prompt) -> None:
        """See what a call of a stage has in common with those of other workflows before."""
        stage, prefix = (prompt.graph, prompt.stage, prompt.ask.scope), prompt.ask.prefix
        seen = self._seen.get(stage)
        if seen is None or seen.frame != prompt.frame or not in_common(seen.prefix, prefix):
            self._seen.set(stage, _Seen(prefix, prompt.frame, workflow))
            self._beginnings.take(stage)
            return
        common = in_common(seen.prefix, prefix)
        if seen.workflow != workflow:
            seen.agreed += 1
        shorter, seen.workflow = common < len(seen.prefix), workflow
        seen.prefix = seen.prefix[:common]
        if seen.agreed >= AGREED and (shorter or self._beginnings.get(stage) is None):
            self._beginnings.put(stage, prompt.beginning(common))

    def extend(self, split: SplitPrompt) -> bool:
        """Keep what is certain of a workflow's next prompt; returns whether it is, and may be warmed."""
        if (left := self._declined.get(split.stage)) is not None:
            if left > 1:
                self._declined.set(split.stage, left - 1)
            else:
                self._declined.pop(split.stage)
            return False
        key = (split.workflow, split.stage)
        for known in (self.last.get(key), self.last.get(split.workflow)):
            if known is not None and known.call_id == split.call:
                self.split.add(key)
                self.last.put(key, replace(known.extended(split.messages), partly=split.partly))
                return self.last.get(key) is not None
        return False

    def next(self, workflow: str, stage: tuple[str, str], call: str) -> Prompt | None:
        """Return what is certain of the prompt of a stage that follows on a call."""
        prompt = self.last.get((workflow, stage))
        return prompt if prompt is not None and prompt.call_id == call else None

    def came(self, workflow: str, stage: tuple[str, str]) -> None:
        """Note that a call of a stage comes: what was certain of its prompt is of no use any more."""
        if (key := (workflow, stage)) in self.split:
            self.split.discard(key)
            self.last.take(key)

    def forget(self, workflow: str) -> None:
        """Drop what is kept of a workflow."""
        self.last.take(workflow)
        for key in [key for key in self.split if key[0] == workflow]:
            self.came(*key)

    def declined(self, stage: tuple[str, str]) -> None:
        """Note that an engine refused what is certain of a stage's next prompt (its template may want one result)."""
        self._declined.set(stage, AGAIN_AFTER)

    def unfit(self, stage: tuple[str, str], scope: str = "") -> None:
        """Note that an engine refused a stage's beginning (its template may want a user's turn)."""
        key = (*stage, scope)
        self._beginnings.take(key)
        if (seen := self._seen.get(key)) is not None:
            seen.agreed = -AGAIN_AFTER

    def beginning(self, graph: str, stage: str, scope: str = "") -> Prompt | None:
        """Return what the prompts of a stage begin with in a scope; ``None`` while that is not certain."""
        return self._beginnings.get((graph, stage, scope))
