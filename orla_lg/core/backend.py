"""What an engine is to us: how it is named, what it can do, and what an adapter must offer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, Protocol
from urllib.parse import urlsplit

from orla_lg.core.call import Ask, Chunk
from orla_lg.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Cost:
    """Prices of a backend in US dollars per million tokens."""

    input_per_mtoken: float = 0.0
    output_per_mtoken: float = 0.0
    cached_input_per_mtoken: float | None = None
    """Price of prompt tokens found in the cache; ``None`` prices them as input."""

    def __post_init__(self) -> None:
        for price in (self.input_per_mtoken, self.output_per_mtoken, self.cached_input_per_mtoken or 0.0):
            if price < 0:
                raise ConfigError(f"a price must not be negative, got {price}")


OWN_HEADERS = frozenset({
    "authorization", "proxy-authorization", "accept-encoding", "connection", "content-length", "host",
    "transfer-encoding",
})  # fmt: skip
"""Headers of which a backend has its own."""


@dataclass(frozen=True)
class Backend:
    """A named engine endpoint plus a model.

    Raises:
        ConfigError: A field cannot be right.
    """

    name: str
    url: str
    """The OpenAI-compatible base, usually ending in ``/v1``."""
    model: str | None = None
    """The model to ask for; ``None`` takes the first that the engine serves."""
    engine: str = "openai"
    """The adapter, by its entry-point name in the group ``orla_lg.backends``."""
    api_key: str | None = field(default=None, repr=False)
    """Sent to this backend only; ``None`` sends a placeholder. A caller's own key never goes here."""
    aliases: Sequence[str] = ()
    """Other model names in code that mean this backend."""
    max_concurrency: int | None = None
    """Calls in flight at once; ``None`` means the engine's slots if it has them, else unbounded."""
    capacity: int = 10_000
    """Calls that may wait before ``QueueFull``."""
    cost: Cost = Cost()
    quality: float | None = None
    """0 to 1, for mappers that weigh it."""
    max_saved: int = 32
    """Files that the engine may keep on its disk for us at once, each as large as a slot's KV cache, for workflows
    that had to leave their slot (llama.cpp with ``--slot-save-path``); 0 saves none."""
    kv_events: str | None = None
    """Where the engine publishes its cache events (ZeroMQ, ``tcp://host:port``); ``None`` does not listen."""
    kv_replay: str | None = None
    """Where it repeats those that were missed (its ``replay_endpoint``)."""
    admin_key: str | None = field(default=None, repr=False)
    """For orders that the engine takes from administrators only; ``None`` gives them with ``api_key``."""

    forward_headers: Sequence[str] = ()
    """Headers of a caller's SDK client that go to this backend, beside those of tracing and the like that always do;
    for instance a gateway's ``X-Team``. Credentials among them reach this backend."""
    forward_query: Sequence[str] = ()
    """The same for query parameters, beside ``api-version``."""

    def __post_init__(self) -> None:
        where = f"backend {self.name!r}"
        if isinstance(self.aliases, str):
            raise ConfigError(f"{where}: aliases must be a list of names, got {self.aliases!r}")
        object.__setattr__(self, "aliases", tuple(self.aliases))
        for name in ("forward_headers", "forward_query"):
            if isinstance(getattr(self, name), str):
                raise ConfigError(f"{where}: {name} must be a list of names, got {getattr(self, name)!r}")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if own := OWN_HEADERS & {name.lower() for name in self.forward_headers}:
            raise ConfigError(
                f"{where}: forward_headers must not name {', '.join(sorted(own))}: the backend's own key is "
                "sent, and what frames a request is set for each connection"
            )
        if not self.name or self.name in ("*", "auto"):
            raise ConfigError(f"{where}: a backend needs a name other than '*' and 'auto'")
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise ConfigError(f"{where}: url {self.url!r} is not http(s)://host[:port]/path")
        if self.max_concurrency is not None and self.max_concurrency < 1:
            raise ConfigError(f"{where}: max_concurrency must be at least 1, got {self.max_concurrency}")
        if self.capacity < 0:
            raise ConfigError(f"{where}: capacity must not be negative, got {self.capacity}")
        if self.max_saved < 0:
            raise ConfigError(f"{where}: max_saved must not be negative, got {self.max_saved}")
        for name in ("kv_events", "kv_replay"):
            _check_endpoint(where, name, getattr(self, name))
        if self.kv_replay is not None and self.kv_events is None:
            raise ConfigError(f"{where}: kv_replay {self.kv_replay!r} repeats kv_events, which is not set")
        if self.quality is not None and not 0 <= self.quality <= 1:
            raise ConfigError(f"{where}: quality must lie in [0, 1], got {self.quality}")


def _check_endpoint(where: str, name: str, said: str | None) -> None:
    if said is None:
        return
    try:
        parts = urlsplit(said)
        right = parts.scheme == "ipc" or (parts.scheme == "tcp" and parts.hostname and parts.port is not None)
    except ValueError:  # a port that is no number
        right = False
    if not right or parts.hostname == "*":
        raise ConfigError(
            f"{where}: {name} {said!r} is not tcp://host:port or ipc://path, as seen from here (a host of '*' is the "
            "engine's side of it)"
        )


class Capability(StrEnum):
    """What engines differ in."""

    JSON_SCHEMA = "json_schema"
    TOOLS = "tools"
    STREAM_USAGE = "stream_usage"
    """Token counts at the end of a stream."""
    CACHED_TOKENS = "cached_tokens"
    """How many prompt tokens the KV cache already held."""
    PRIORITY = "priority"
    """Its own queue heeds a number."""
    WARM = "warm"
    PIN = "pin"
    RELEASE = "release"
    """One workflow's cache made the first to go, or given away, but usable until then."""
    KEEP = "keep"
    """What it keeps, and for how long, follows what is expected to be of use (``Directions.keep_s``)."""
    FLUSH_WORKFLOW = "flush_workflow"
    FLUSH_PREFIX = "flush_prefix"
    FLUSH_ALL = "flush_all"
    SAVE_RESTORE = "save_restore"
    STATS = "stats"
    TOKENIZE = "tokenize"
    ABORT = "abort"
    """A request ended by name; every engine we know ends one whose connection closes."""
    SLEEP = "sleep"
    """The model put out of memory and back."""


class Support(StrEnum):
    """How an engine has a capability; ``flag`` and ``plugin`` say what it takes to gain it."""

    NATIVE = "native"
    FLAG = "flag"
    PLUGIN = "plugin"
    EMULATED = "emulated"
    UNSUPPORTED = "unsupported"

    @property
    def usable(self) -> bool:
        """Whether it works now, as the engine was started."""
        return self in (Support.NATIVE, Support.EMULATED)


class Effect(StrEnum):
    """What really happened to a cache; an adapter never claims more."""

    FREED = "freed"
    DEMOTED = "demoted"
    PINNED = "pinned"
    SAVED = "saved"
    RESTORED = "restored"
    WARMED = "warmed"
    DEFERRED = "deferred"
    FAILED = "failed"
    UNSUPPORTED = "unsupported"
    UNKNOWN = "unknown"
    """It was asked, and no answer came: we closed before, or the adapter broke."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What an engine said of itself when it was connected."""

    models: tuple[str, ...] = ()
    """Names it serves; empty where it does not list them."""
    capabilities: Mapping[Capability, Support] = field(default_factory=dict)
    context_tokens: int | None = None
    """The longest prompt plus answer, in tokens."""
    slots: int | None = None
    """Exclusive cache slots, for engines that have them."""
    kv_tokens: int | None = None
    """What the whole KV cache holds, in tokens."""
    request_tokens: int | None = None
    """What a prompt and its ``max_tokens`` may be together; ``None`` where the answer is just cut short."""
    vision: bool | None = None
    """Whether it reads images; ``None`` where it does not say."""
    version: str = ""
    incarnation: str = ""
    """Differs after a restart of the engine; empty where the engine does not let one tell."""
    weights: str = ""
    """What a saved cache fits to: it must not be restored where this differs. Empty where nothing can be saved."""
    advice: Mapping[Capability, str] = field(default_factory=dict)
    """For each capability that a flag or a plugin would bring: what to start the engine with."""

    def can(self, capability: Capability) -> bool:
        """Whether the capability works; one that the engine does not mention is assumed to."""
        return self.capabilities.get(capability, Support.NATIVE).usable


@dataclass(frozen=True, slots=True)
class Directions:
    """What was decided about a call that its engine may be told; the adapter translates."""

    call_id: str = ""
    """Of this attempt: an engine may still be busy with the last one, and refuses a name twice."""
    workflow: str = ""
    priority: float = 0.0
    """Higher is more urgent, 0 where nobody said anything."""
    slot: int | None = None
    """The cache slot the workflow sits in, on engines that have slots."""
    fresh: bool = False
    """The slot may hold tokens that were flushed: they must not be reused."""
    stage: str = ""
    keep_s: float | None = None
    """For how long after this call its cache is expected to be of use; ``None`` where that is not known."""


def with_fields(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return *body* with an adapter's *fields*; where both have an object, one with the entries of both."""
    both = {name: value for name, value in fields.items() if _is_object(value) and _is_object(body.get(name))}
    return {**body, **fields, **{name: {**body[name], **value} for name, value in both.items()}}


def _is_object(value: Any) -> bool:
    return isinstance(value, Mapping)


class BackendAdapter(Protocol):
    """The least an engine must have. Built with its ``Backend``; its coroutines run on Orla's loop.

    What only some engines can are Protocols of their own: ``core.control``.
    """

    keep_alive: bool
    """Whether a connection may serve another request after a stream."""

    async def probe(self) -> Probe:
        """Ask the engine what it is.

        Raises:
            BackendUnavailable: It does not answer.
        """
        ...

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Return extra body fields for one request; never one that the engine would refuse.

        They take the place of the caller's own, except that objects are merged (``with_fields``).

        Called on the request path, so it must not wait for anything.

        Args:
            ask: What the request asks for.
            told: What was decided about the call.
        """
        ...

    def generate(self, body: Mapping[str, Any]) -> AsyncGenerator[Chunk]:
        """Stream a raw chat completion, for warm-ups, conformance and the gateway.

        Closing the generator ends the request on the engine too.

        Raises:
            BackendUnavailable: The engine did not answer, or its stream broke.
            EngineRefused: It answered that it will not.
        """
        ...

    async def aclose(self) -> None:
        """Close the adapter's own connections."""
        ...
