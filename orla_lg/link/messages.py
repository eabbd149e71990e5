"""The messages between a replica (the side that calls) and the core (the side that decides), as flat values.

On the wire a message is an array: its name, then its fields in the order written here (``framing``). Fields are only
ever appended, with defaults: an older peer sends fewer, a newer one more, and both are understood, so that replicas
and cores are updated one after the other. What is no longer understood changes ``PROTOCOL``.

There are no instants in them, only ages and remaining times in seconds: clocks of two machines have nothing in
common. Prompts do not travel; their chained hashes do, eight bytes for each message.

A connection begins with ``Hello`` and ``Welcome``. The replica then says what it has: its open runs (``Signal``),
the grants that it holds (``Adopt``), the calls that wait (``Enter``, in the order of their arrival), and ``Ready``. A
core that has just begun grants nothing until all replicas that held something said so, or their leases are over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import UnionType
from typing import Any, NamedTuple, get_args, get_type_hints

from orla_lg.link.framing import LinkBroken

PROTOCOL = 1
"""Peers with another number do not understand each other."""

PATH = "/v1/orla/link"
"""Where a link is asked for, by an HTTP/1.1 upgrade to ``UPGRADE``."""

UPGRADE = "orla-link"

CORES_HEADER = "x-orla-cores"
"""Of a refusal by a standby: URLs of the core, which commas separate."""

RENEW_S = 0.5
"""How often a replica renews its lease, in seconds; a connection on which nothing came for ``SILENT_S`` is dead."""

SILENT_S = 2.0

Flat = dict[str, Any]
"""A table of names and plain values: numbers, texts, lists and tables of these."""


class FlatMessage(NamedTuple):
    """A message of a prompt, which does not travel."""

    hashed: int
    """Chained with those before it (``Ask.prefix``), outside any scope."""
    chars: int


class Hello(NamedTuple):
    """Replica to core, first of all."""

    protocol: int
    replica: str
    """Random, new for each process (after a fork too)."""
    version: str = ""
    """Of the package; for people."""
    epoch: int = 0
    """The last epoch that the replica knew; 0: none."""
    names: Sequence[str] = ()
    """Backends that the replica's own mappings name."""
    host: str = ""
    """As ``whereabouts.here`` has it."""
    pid: int = 0
    moves: bool = False
    """Whether it understands ``Moved``."""
    pool: str = ""
    """Whose core it looks for; empty: any."""


class Welcome(NamedTuple):
    """Core to replica: what it is, and what it serves; never a key."""

    protocol: int
    epoch: int
    """Grows with each core on the same store; a replica refuses grants of an older one."""
    version: str = ""
    backends: Sequence[Flat] = ()
    """Name, URL, model, engine, prices and so on of each, and ``api_key_env``, where the replica finds its key."""
    views: Sequence[Flat] = ()
    """Of each backend, as in ``View``."""
    mapping: Flat = {}  # noqa: RUF012 - never changed
    """What the shared mapping and its variants say beforehand, for ``plan`` and ``check``."""
    limits: Flat = {}  # noqa: RUF012
    replica_lease_s: float = 10.0
    """A replica without any core for so long ends its own requests."""
    core_lease_s: float = 1.5
    replicas: int = 1
    """Connected now, this one included."""
    tenants: Sequence[str] | None = None
    """Those that the key carries; ``None``: any."""
    guarded: bool = False
    """Access policies hold, so that nothing may be sent that the core was not asked about."""
    cores: Mapping[str, Sequence[str]] = {}
    """By pool, the URLs of its core and then of its standbys, as far as the core's directory has them."""
    pool: str = ""
    """That this core decides for."""
    pools: Sequence[Flat] = ()
    """With pools all backends in the order of the configuration, each with its ``pool``: this core's by name alone,
    the others as in ``backends``, so that they are known where their core is not there yet."""


class Enter(NamedTuple):
    """Replica to core: a call arrived. Answered by ``Grant`` or ``Refused``; idempotent by its id."""

    call: str
    age_s: float
    """Since it arrived at the replica."""
    workflow: str
    """The key, without a tenant: the core adds it."""
    run: str | None
    stage: str
    step: int | None
    namespace: str
    thread: bool
    identified: bool
    model: str
    """As the code names it."""
    stream: bool
    json_schema: bool
    tools: bool
    embeds: bool
    images: bool
    may_pass: bool
    hashes: Sequence[int]
    """Of each message of the prompt, chained (``Ask.prefix``), outside any scope."""
    chars: Sequence[int]
    """Of each message."""
    answers: Sequence[int]
    """Which messages are a model's, by index."""
    prompt_chars: int
    tools_chars: int
    max_tokens: int | None
    said: Flat
    """Hints given with the call itself."""
    hints: Flat
    """Those of the run, the node and its configuration."""
    own: Flat | None
    """Where the graph's own mapper, in the replica, wants it; ``None``: the core's mapping decides."""
    able: Sequence[str] | None
    """The backends that the replica can send the request to; ``None``: all."""
    holds: Sequence[str]
    """The backends on which its caller holds a grant."""
    max_attempts: int
    timeout_s: float | None
    """Of the caller's client, for each attempt."""
    layers: Sequence[Flat] = ()
    """Limits of its graph and its run: ``key``, ``where``, ``of_run`` and the table ``limits``."""
    attempts: int = 0
    """Grants that it had in this epoch: the next one counts on from there."""
    tags: Flat = {}  # noqa: RUF012
    """That its ``Orla`` claims, beside the key's."""
    tool_names: Sequence[str] = ()
    """Of the tools that it offers."""
    labels: Sequence[str] = ()
    """Of its data, as the replica knows them."""
    for_stage: str | None = None
    """The stage whose prompt it carries, where that is another one than its own."""
    moved: bool = False
    """Another pool's core mapped it: ``own`` is what that said, and no mapper here is asked again."""
    key: str | None = None
    """The id of the key in whose name a gateway makes the call; only a link of scope ``gateway`` may say so."""
    by_name: bool = False
    """It comes from no graph: where no mapping names its stage, its model's name says where it goes."""


class Adopt(NamedTuple):
    """Replica to core, between ``Hello`` and ``Ready``: a call that holds a grant of an earlier core."""

    enter: Sequence[Any]
    """The fields of its ``Enter``."""
    backend: str
    model: str | None
    attempt: int
    first: bool
    """Whether its first token came."""
    slot: int | None = None


class SlotContents(NamedTuple):
    """Replica to core, between ``Hello`` and ``Ready``: what its last call in an engine's slot left there.

    Said to a core that did not see that call: it gives the slot to the same workflow again.
    """

    enter: Sequence[Any]
    """The fields of the call's ``Enter``."""
    backend: str
    slot: int
    tokens: int
    """Of its prompt and its answer."""
    age_s: float
    """Since its end."""


class Ready(NamedTuple):
    """Replica to core: all that it had is said."""


class Grant(NamedTuple):
    """Core to replica: the call may go."""

    call: str
    epoch: int
    attempt: int
    """Counts from 1; a second grant of the same attempt is ignored."""
    backend: str | None
    """``None``: nothing places the call, and it goes where its code says."""
    model: str | None
    mapper: str | None = None
    reason: str = ""
    parameters: Flat = {}  # noqa: RUF012
    considered: Sequence[Flat] = ()
    fields: Flat = {}  # noqa: RUF012
    """Extra fields of the body, for this engine and this call."""
    counts_streams: bool = False
    """Whether the engine counts tokens at the end of a stream when asked."""
    expected_tokens: int | None = None
    """Of the prompt, what should be in the engine's cache."""
    cache_action: str | None = None
    """What is planned with the slot's contents; ``None`` on engines without slots."""
    slot: int | None = None
    final_odds: float | None = None
    """How likely the call is its run's last, where the order of the queue went by that."""


class Refused(NamedTuple):
    """Core to replica: the call ends here."""

    call: str
    kind: str
    """The class of the error (``errors``); ``timeout``: the caller's own; ``cause``: what its last attempt met."""
    text: str
    more: Flat = {}  # noqa: RUF012
    """The error's other arguments."""


class Moved(NamedTuple):
    """Core to replica: the call is mapped to a backend of another pool. It was never here; it enters there."""

    call: str
    pool: str
    own: Flat
    """Where it was mapped, as in ``Enter.own``; its first backend is of that pool."""


class FirstToken(NamedTuple):
    """Replica to core: the prefill is done; others may have waited for that, so it is never held back."""

    call: str
    attempt: int


class Missed(NamedTuple):
    """Replica to core: an attempt failed before its first token. Answered by ``Grant`` or ``Refused``."""

    call: str
    attempt: int
    cause: str
    unreachable: bool
    overloaded: bool
    elsewhere: bool
    retry_after_s: float | None
    unused: bool = False
    """Nothing was sent: the grant was over before, and is none of the attempts that the call may make."""


class End(NamedTuple):
    """Replica to core: the call is over, its grant comes back; also ends a wait. Idempotent."""

    call: str
    error: str | None
    """``None``: all went well."""
    broke: bool
    """The engine's answer broke off."""
    prompt_tokens: int | None = None
    """``None``: the engine counted nothing."""
    cached_tokens: int | None = None
    completion_tokens: int = 0
    prefill_s: float | None = None
    external: bool = False


class Signal(NamedTuple):
    """Replica to core: something happened to a run, a node or a tool (``memory.progress.GraphProgress``)."""

    what: str
    """The name of the method."""
    run: str
    more: Flat = {}  # noqa: RUF012
    """Its other arguments; of ``run_started`` also ``age_s``, ``thread``, ``tenant``, ``parent``, ``graph`` and, said
    again, ``entered`` (of each stage with labels that it entered before, these); of ``node_entered`` also
    ``labels``; of ``prompt_split`` ``call``, ``backend``, ``graph``, ``stage``, ``messages`` (as ``FlatMessage``),
    ``results``, ``running`` (names and seconds), ``partly`` and ``at_once``; of ``entered``, of a run that has ended,
    ``thread``, ``tenant``, ``graph``, ``entered`` and ``outcome``."""


class Graph(NamedTuple):
    """Replica to core, once for each wrapped graph: its structure (``lookahead.structure``)."""

    name: str
    edges: Mapping[str, Sequence[Any]]
    """By stage: stages that follow always, stages that may follow, whether that is open."""
    joins: Mapping[str, Sequence[str]]
    homes: Mapping[str, str]
    """Where stages go, as far as that shows beforehand."""
    labels: Mapping[str, Sequence[str]] = {}
    """By stage, the labels of its data; and those that it takes off."""
    declassifies: Mapping[str, Sequence[str]] = {}


class View(NamedTuple):
    """Core to replica, at changes, at most every 100 ms: what mappers and probes see of the backends."""

    views: Sequence[Flat]
    replicas: int = 1


class Warm(NamedTuple):
    """Core to replica: send a prefetch with the prompt that you keep for the workflow. Answered by ``WarmEnded``."""

    order: str
    workflow: str
    backend: str
    fields: Flat
    stage: str = ""
    """Where given, what that stage of ``graph`` begins with is meant, as any prompt of it that is kept has it."""
    graph: str = ""
    messages: int | None = None
    """So many leading messages; ``None``: all."""
    prefix: int = 0
    """The hash of the last of these; a prompt with another one there is not sent."""
    next_of: str = ""
    """Where given, what is certain of the stage's prompt after this call is meant (signal ``prompt_split``)."""
    kept_for: str = ""
    """Where given, the backend for which the prompt is kept, which now goes to *backend* as one of *model*."""
    model: str = ""


class StopWarm(NamedTuple):
    """Core to replica: give a prefetch up."""

    order: str


class WarmEnded(NamedTuple):
    """Replica to core: how a prefetch ended."""

    order: str
    error: str | None
    prompt_tokens: int | None = None
    cached_tokens: int | None = None


class Keeps(NamedTuple):
    """Replica to core: for this workflow it keeps a prompt that may be warmed."""

    call: str
    chars: int
    """Of all its text, tool schemas and images included."""
    frame: int = 0
    """The same number where request bodies are the same but for their messages."""


class Renew(NamedTuple):
    """Replica to core, every ``RENEW_S`` seconds: still here. Answered by ``Renewed``."""

    number: int


class Renewed(NamedTuple):
    """Core to replica: the lease goes on, counted from when ``Renew`` was sent."""

    number: int
    replicas: int


class Request(NamedTuple):
    """Replica to core: a question, or a change to the running core. Answered by ``RequestDone``."""

    number: int
    what: str
    """``statistics``, ``prioritize``, ``pause``, ``resume``, ``drain``, ``set_policy``, ``set_limit``, ``ahead``,
    ``feedback``, ``resident``, ``limits``, ``move``, ``key``, ``thread``."""
    more: Flat


class RequestDone(NamedTuple):
    """Core to replica."""

    number: int
    value: Any
    error: str | None = None
    """The class of the error; its text is *value* then."""


class Bye(NamedTuple):
    """Either way: the sender goes in good order. A replica has ended its calls; a core is followed by another one."""

    reason: str = ""


Message = (
    Hello | Welcome | Enter | Adopt | SlotContents | Ready | Grant | Refused | Moved | FirstToken | Missed | End
    | Signal | Graph | View | Warm | StopWarm | WarmEnded | Keeps | Renew | Renewed | Request | RequestDone | Bye
)  # fmt: skip
"""Any of them."""


class _Shape:
    """What the fields of a message may be."""

    def __init__(self, kind: type[Any]) -> None:
        hints = get_type_hints(kind)
        self.make = kind._make
        self.types = tuple(_types(hints[name]) for name in kind._fields)
        self.defaults = tuple(kind._field_defaults.get(name, _MISSING) for name in kind._fields)

    def read(self, name: str, fields: Sequence[Any]) -> Any:
        types = self.types
        values = list(fields[: len(types)])
        if missing := len(types) - len(values):
            values += self.defaults[-missing:]
        if not all(map(isinstance, values, types)) or (missing and any(value is _MISSING for value in values)):
            at = next(
                at for at, each in enumerate(types) if values[at] is _MISSING or not isinstance(values[at], each)
            )
            found = "nothing" if values[at] is _MISSING else type(values[at]).__name__
            raise LinkBroken(f"message {name!r}: field {at} is {found}")
        return self.make(values)


_MISSING = object()
_ANY = (object,)
_ORIGINS: Mapping[Any, tuple[type, ...]] = {
    float: (int, float), Sequence: (list, tuple), Mapping: (dict,), dict: (dict,),
}  # fmt: skip


def _types(hint: Any) -> tuple[type, ...]:
    if hint is Any:
        return _ANY
    if isinstance(hint, UnionType):
        return tuple(each for part in get_args(hint) for each in _types(part))
    origin = getattr(hint, "__origin__", hint)
    types: tuple[type, ...] = _ORIGINS.get(origin, (origin,))
    return types


def flat(message: Message) -> tuple[Any, ...]:
    """Return a message as ``framing`` packs it."""
    return (type(message).__name__, *message)


def read(fields: Sequence[Any]) -> Message | None:
    """Return the message in an array; ``None`` for one of a kind that a newer peer may know.

    Raises:
        LinkBroken: A field is missing, or of another type.
    """
    shape = _SHAPES.get(fields[0])
    return None if shape is None else shape.read(fields[0], fields[1:])


_SHAPES = {kind.__name__: _Shape(kind) for kind in get_args(Message)}
