"""An engine's name and address, what it can do, and what an adapter must offer."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import urlsplit

from orla_lg.arguments import answering
from orla_lg.core.boundary import checked
from orla_lg.core.boundary.secret import Secret
from orla_lg.core.call import Ask, Chunk, Usage
from orla_lg.errors import ConfigError, shown

if TYPE_CHECKING:
    _Key = str | None
else:
    _Key = InitVar[str | None]  # taken by the constructor, and no field: ``asdict`` and ``repr`` have no key in them

MOST_SAVED = 10_000
"""Files that an engine may be asked to keep: each is as large as a slot's KV cache."""

MOST_CALLS = 2**53
"""Bounds on calls are numbers that JSON and floats carry exactly."""


@answering
@dataclass(frozen=True, slots=True)
class Cost:
    """Prices of a backend in US dollars per million tokens."""

    input_per_mtoken: float = 0.0
    output_per_mtoken: float = 0.0
    cached_input_per_mtoken: float | None = None
    """Price of prompt tokens found in the cache; ``None`` prices them as input."""

    def __post_init__(self) -> None:
        for name in ("input_per_mtoken", "output_per_mtoken", "cached_input_per_mtoken"):
            price = getattr(self, name)
            if not (price is None and name == "cached_input_per_mtoken"):
                checked.number(f"{name}: a price", price, least=0)


OWN_HEADERS = frozenset({
    "authorization", "proxy-authorization", "accept-encoding", "connection", "content-length", "host",
    "transfer-encoding",
})  # fmt: skip
"""Headers of which a backend has its own."""


@answering
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
    """The model to ask for; ``None`` takes the one that the code names if the engine serves it, else its only one."""
    engine: str = "openai"
    """The adapter, by its entry-point name in the group ``orla_lg.backends``."""
    api_key: _Key = None
    """Sent to this backend only; ``None`` sends a placeholder. A caller's own key never goes here. It is read as
    text, and is in nothing that prints or converts the backend (``core.boundary.secret``)."""
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
    slot_folder: str = ""
    """A name for the folder that the engine saves slots in, the same for all engines that save there: each restores
    what the others saved of a workflow that is moved (``Orla.move``). Empty: no other engine reads it."""
    kv_events: str | None = None
    """Where the engine publishes its cache events (ZeroMQ, ``tcp://host:port``), for what reads the adapter's
    ``kv_events()``; the core does not."""
    kv_replay: str | None = None
    """Where it repeats those that were missed (its ``replay_endpoint``)."""
    admin_key: _Key = None
    """For orders that the engine takes from administrators only; ``None`` gives them with ``api_key``."""
    isolate_tenants: bool = False
    """No tenant finds a prefix that another one left in the cache; they share none, then, not even system prompts."""

    forward_headers: Sequence[str] = ()
    """Headers of a caller's SDK client that go to this backend, beside those of tracing and the like that always do;
    for instance a gateway's ``X-Team``. Credentials among them reach this backend."""
    forward_query: Sequence[str] = ()
    """The same for query parameters, beside ``api-version``."""

    assemble: bool | None = None
    """Whether an answer that is asked for in one piece is streamed from the engine where a tool may start early;
    ``None``: if a short pair of requests, at the first use, shows both to be equal."""
    early_tools: bool = True
    """Whether tools may start while this backend still decodes."""

    def __post_init__(self, *keys: str | None) -> None:
        checked.text("backend: the name", self.name, empty=True)
        where = f"backend {shown(self.name)}"
        if not self.name or self.name in ("*", "auto"):
            raise ConfigError(f"{where}: a backend needs a name other than '*' and 'auto'")
        for name, key in zip(("api_key", "admin_key"), keys, strict=True):
            self.__dict__[name] = None if key is None else Secret(key, f"{where}: {name}")
        checked.text(f"{where}: engine", self.engine)
        if self.model is not None:
            checked.text(f"{where}: model", self.model)
        for listed in ("aliases", "forward_headers", "forward_query"):
            object.__setattr__(self, listed, checked.texts(f"{where}: {listed}", getattr(self, listed)))
        if own := OWN_HEADERS & {name.lower() for name in self.forward_headers}:
            raise ConfigError(
                f"{where}: forward_headers must not name {', '.join(sorted(own))}: the backend's own key is "
                "sent, and what frames a request is set for each connection"
            )
        _check_url(where, self.url)
        if self.max_concurrency is not None:
            checked.whole(f"{where}: max_concurrency", self.max_concurrency, least=1, most=MOST_CALLS)
        checked.whole(f"{where}: capacity", self.capacity, most=MOST_CALLS)
        checked.whole(f"{where}: max_saved", self.max_saved, most=MOST_SAVED)
        checked.text(f"{where}: slot_folder", self.slot_folder, empty=True)
        if not isinstance(self.cost, Cost):
            raise ConfigError(f"{where}: cost must be a Cost(...), got {shown(self.cost)}")
        for name in ("kv_events", "kv_replay"):
            _check_endpoint(where, name, getattr(self, name))
        if self.kv_replay is not None and self.kv_events is None:
            raise ConfigError(f"{where}: kv_replay {shown(self.kv_replay)} repeats kv_events, which is not set")
        if self.quality is not None and not 0 <= checked.number(f"{where}: quality", self.quality) <= 1:
            raise ConfigError(f"{where}: quality must lie in [0, 1], got {self.quality}")
        checked.flag(f"{where}: isolate_tenants", self.isolate_tenants)
        checked.flag(f"{where}: early_tools", self.early_tools)
        if self.assemble is not None:
            checked.flag(f"{where}: assemble", self.assemble)


if not TYPE_CHECKING:

    def _reveals(name: str) -> property:
        """Return the attribute by which adapters read a key as text."""

        def reveal(self: Backend) -> str | None:
            secret = self.__dict__[name]
            return None if secret is None else secret.reveal()

        return property(reveal)

    Backend.api_key, Backend.admin_key = _reveals("api_key"), _reveals("admin_key")


def _check_url(where: str, url: object) -> None:
    """Refuse what no client could open, and a password, which would stand in messages and records."""
    right = "http(s)://host[:port]/path"
    checked.text(f"{where}: url", url)
    assert isinstance(url, str)
    try:
        parts = urlsplit(url)
        if parts.username is not None or parts.password is not None:
            raise ConfigError(
                f"{where}: url must be {right}, without a user's name or password before the host, as messages show "
                "it; a key is given as api_key"
            )
        host = (parts.hostname or "").encode("idna").decode()
        fault = "" if parts.port != 0 else ": no server has port 0"
    except (ValueError, UnicodeError) as error:  # a port that is none, brackets that are no address, a label too long
        raise ConfigError(f"{where}: url {shown(url)} is not {right}: {error}") from None
    if fault or parts.scheme not in ("http", "https") or not host or any(each.isspace() for each in url):
        raise ConfigError(f"{where}: url {shown(url)} is not {right}{fault}")


def _check_endpoint(where: str, name: str, endpoint: object) -> None:
    if endpoint is None:
        return
    checked.text(f"{where}: {name}", endpoint)
    assert isinstance(endpoint, str)
    try:
        parts = urlsplit(endpoint)
        right = parts.scheme == "ipc" or (parts.scheme == "tcp" and parts.hostname and parts.port is not None)
        anywhere = parts.hostname == "*"
    except ValueError:  # a port that is no number, a bracket that is not closed
        right = anywhere = False
    if not right or anywhere:
        raise ConfigError(
            f"{where}: {name} {shown(endpoint)} is not tcp://host:port or ipc://path, as seen from here (a host of "
            "'*' is the engine's side of it)"
        )


def price(usage: Usage | None, cost: Cost) -> float | None:
    """Return what a call costs in US dollars; ``None`` without token counts."""
    if usage is None:
        return None
    cached = min(usage.cached_tokens or 0, usage.prompt_tokens)
    cached_price = cost.input_per_mtoken if cost.cached_input_per_mtoken is None else cost.cached_input_per_mtoken
    fresh = (usage.prompt_tokens - cached) * cost.input_per_mtoken
    return (fresh + cached * cached_price + usage.completion_tokens * cost.output_per_mtoken) / 1e6


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
    ISOLATE = "isolate"
    """A tenant's cached prefixes are found by that tenant only (``Backend.isolate_tenants``)."""
    FLUSH_WORKFLOW = "flush_workflow"
    FLUSH_PREFIX = "flush_prefix"
    FLUSH_ALL = "flush_all"
    SAVE_RESTORE = "save_restore"
    STATS = "stats"
    TOKENIZE = "tokenize"
    ABORT = "abort"
    """A request ended by name; every engine we know ends one when its connection closes."""
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


MAX_MODELS, MAX_NAME_CHARS, MAX_SLOTS, MAX_WIRES = 10_000, 1_000, 4_096, 64
"""Of what an engine says of itself; more is not believed, for each of them sizes something here."""

_MOST = 2**53


def whole(value: object) -> int | None:
    """Return a positive whole number that a peer sent, also as text; ``None`` where it is none."""
    if isinstance(value, str) and value.isascii() and value.isdecimal() and len(value) < len(str(_MOST)):
        value = int(value)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MOST else None


@answering
@dataclass(frozen=True, slots=True)
class Probe:
    """What an engine answered to a probe: its models, capabilities and sizes."""

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
    aliases: Mapping[str, str] = field(default_factory=dict)
    """Names among ``models`` that are another one's, each with that one."""
    wires: frozenset[str] = frozenset()
    """Names of the wires that the engine speaks: ``chat``, ``messages``, ``responses`` and so on. A request of
    another wire is translated to chat completions, which are spoken by each engine, named here or not."""

    def __post_init__(self) -> None:
        """Leave out of a peer's answer what cannot be right: decisions rely on the types of these fields."""
        names = [name for name in self.models if isinstance(name, str) and name and len(name) <= MAX_NAME_CHARS]
        object.__setattr__(self, "models", tuple(dict.fromkeys(names))[:MAX_MODELS])
        for figure in ("context_tokens", "kv_tokens", "request_tokens", "slots"):
            object.__setattr__(self, figure, whole(getattr(self, figure)))
        if (self.slots or 0) > MAX_SLOTS:
            object.__setattr__(self, "slots", None)
        if not isinstance(self.vision, bool):
            object.__setattr__(self, "vision", None)
        wires = sorted(name for name in self.wires if isinstance(name, str) and 0 < len(name) <= MAX_NAME_CHARS)
        object.__setattr__(self, "wires", frozenset(wires[:MAX_WIRES]))

    @property
    def distinct(self) -> tuple[str, ...]:
        """The models it serves, each under one name."""
        return tuple(name for name in self.models if name not in self.aliases)

    def can(self, capability: Capability) -> bool:
        """Whether the capability works; one that the engine does not mention is assumed to."""
        return self.capabilities.get(capability, Support.NATIVE).usable


@dataclass(frozen=True, slots=True)
class Directions:
    """What was decided about a call and may go to its engine; the adapter translates."""

    call_id: str = ""
    """Of this attempt: an engine may still be busy with the last one, and refuses a name twice."""
    workflow: str = ""
    priority: float = 0.0
    """Higher is more urgent, 0 where none was given."""
    slot: int | None = None
    """The workflow's cache slot, on engines that have slots."""
    fresh: bool = False
    """The slot may hold tokens that were flushed: they must not be reused."""
    stage: str = ""
    cache_salt: str = ""
    """Prefixes are to be found only by requests with the same one, where tenants are isolated; empty: by all."""
    keep_s: float | None = None
    """For how long after this call its cache is expected to be of use; ``None`` where that is not known."""


def model_asked(own: str | None, probe: Probe | None, in_code: str) -> str | None:
    """Return the model to ask a backend for, never one that was guessed: ``None`` where several are left.

    Args:
        own: The backend's, by its configuration.
        probe: Its engine's answer; one that lists no models may serve whatever the code names.
        in_code: What the code names.
    """
    if own:
        return own
    if probe is None or not probe.models or in_code in probe.models:
        return in_code
    return probe.distinct[0] if len(probe.distinct) == 1 else None


def with_fields(body: Mapping[str, Any], fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return *body* with an adapter's *fields*; where both have an object, one with the entries of both."""
    merged = {**body, **fields}
    for name, value in fields.items():
        if isinstance(value, Mapping) and isinstance(before := body.get(name), Mapping):
            merged[name] = {**before, **value}
    return merged


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


def concurrency_of(backend: Backend, probe: Probe | None) -> int | None:
    """Return how many calls a backend takes at once: what its configuration allows, on as many slots as it has."""
    bounds = (backend.max_concurrency, None if probe is None else probe.slots)
    return min(filter(None, bounds), default=None)
