"""The tables of ``orla.toml``, as pydantic models: which keys there are, and which values each may have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from orla_lg.clients.fitting import Untranslated
from orla_lg.config_objects import is_object
from orla_lg.core.engine.backend import MOST_CALLS, MOST_SAVED
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.policies import policy
from orla_lg.errors import shown

MOST_S = 86_400.0
"""Of a time in ``[serve]``, in seconds: a day."""

MOST_BODY_BYTES = 1 << 30

MOST_STANDBYS = 16
MOST_GATEWAYS = 1_000


class ConfigTable(BaseModel):
    """A table whose keys are known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class CostTable(ConfigTable):
    """``[backends.NAME.cost]``: US dollars per million tokens."""

    input_per_mtoken: float = Field(0.0, ge=0, allow_inf_nan=False)
    output_per_mtoken: float = Field(0.0, ge=0, allow_inf_nan=False)
    cached_input_per_mtoken: float | None = Field(None, ge=0, allow_inf_nan=False)


class BackendTable(ConfigTable):
    """``[backends.NAME]``."""

    url: str
    model: str | None = None
    engine: str = "openai"
    api_key_env: str | None = None
    """The environment variable that holds the key: keys do not belong in a file that is checked in."""
    admin_key_env: str | None = None
    """The same for the key of administrators, where the engine has one of its own for them."""
    aliases: tuple[str, ...] = ()
    max_concurrency: int | None = Field(None, ge=1, le=MOST_CALLS)
    capacity: int = Field(10_000, ge=0, le=MOST_CALLS)
    cost: CostTable = Field(default_factory=lambda: CostTable.model_validate({}))
    quality: float | None = Field(None, ge=0, le=1)
    max_saved: int = Field(32, ge=0, le=MOST_SAVED)
    slot_folder: str = ""
    forward_headers: tuple[str, ...] = ()
    forward_query: tuple[str, ...] = ()
    isolate_tenants: bool = False
    assemble: bool | None = None
    early_tools: bool = True


class GatewayTable(ConfigTable):
    """``[serve.gateway]``: how calls by HTTP are told apart, and what they may take.

    Lists that are left out are those of ``serve.gateway.settings``.
    """

    session_headers: tuple[str, ...] | None = None
    """Headers whose value names a session, the surest first."""
    final_headers: tuple[str, ...] | None = None
    """Headers that say that a call is the last one of its session."""
    session_fields: tuple[str, ...] | None = None
    """Fields of a request's body that name a session."""
    session_idle_s: float = Field(300.0, gt=0, le=MOST_S, allow_inf_nan=False)
    """A session without a call for so long is idle."""
    max_sessions: int = Field(10_000, ge=1, le=MOST_CALLS)
    answer_timeout_s: float = Field(600.0, gt=0, le=MOST_S, allow_inf_nan=False)
    """So long an engine may say nothing."""
    max_attempts: int = Field(3, ge=1, le=100)
    """Of each call, before its first token."""


class PolicyTable(ConfigTable):
    """``[[policies]]``: an access policy."""

    name: str = Field(min_length=1)
    subjects: tuple[str, ...]
    resources: tuple[str, ...]
    action: Literal["allow", "deny"] = "allow"


class LabelTable(ConfigTable):
    """``[stages.NAME]``: the labels of a stage's data."""

    labels: tuple[str, ...] = ()
    declassifies: tuple[str, ...] = ()


class ServeTable(ConfigTable):
    """``[serve]``: how ``orla-lg serve`` is reached and how long it waits; other processes do not read it."""

    listen_address: str | None = Field(None, min_length=1)
    """``HOST:PORT`` or ``unix:PATH``."""
    names: tuple[str, ...] = ()
    """Names that clients reach it by, beside the address that it listens on."""
    store: str | None = Field(None, min_length=1)
    """The file of what outlives a process, or ``redis://HOST:PORT/DB``; other cores of the same pool that name it
    wait for this one's end."""
    on_store_lost: Literal["pause", "go_on"] = "pause"
    """What a core does once the store has not answered for half its lease: it grants nothing, or goes on without."""
    store_password_env: str | None = Field(None, min_length=1)
    """The variable that has the password of a store on Redis, where its URL has none."""
    store_plain_text: bool = False
    """Whether a password may go to a store on another machine in plain text, as within a private network."""
    core: str | None = Field(None, min_length=1)
    """Of ``orla-lg serve --gateway``: where its core is, as ``Orla.remote`` takes it."""
    pool: str = Field("", max_length=100, pattern=r"^[A-Za-z0-9_.-]*$")
    """The pool of backends that this core decides for; empty where one core has them all."""
    standby: bool = False
    """Whether this process is meant to wait for the end of the core that decides, again and again."""
    advertise: tuple[str, ...] = ()
    """URLs that other processes reach this one by, as ``Orla.remote`` takes them; left out: what it listens on."""
    tls_cert: str | None = Field(None, min_length=1)
    tls_key: str | None = Field(None, min_length=1)
    behind_proxy: bool = False
    """A proxy before it speaks TLS."""
    core_lease_s: float = Field(1.5, gt=0, le=MOST_S, allow_inf_nan=False)
    replica_lease_s: float = Field(10.0, gt=0, le=MOST_S, allow_inf_nan=False)
    drain_s: float = Field(30.0, ge=0, le=MOST_S, allow_inf_nan=False)
    """How long SIGTERM waits for calls in flight."""
    max_body_bytes: int = Field(64 << 20, ge=1024, le=MOST_BODY_BYTES)
    body_timeout_s: float = Field(60.0, gt=0, le=MOST_S, allow_inf_nan=False)
    """A request whose body has not come within that is refused; a large one has longer."""
    gateway: GatewayTable = Field(default_factory=lambda: GatewayTable.model_validate({}))
    posted_hosts: tuple[str, ...] | None = None
    """Patterns of ``host`` or ``host:port`` that what is posted by Orla's APIs may name; left out: all but the
    addresses of cloud machines' metadata."""
    posted_key_envs: dict[str, tuple[str, ...]] = {}
    """Variables whose keys posted backends may send, each with the patterns of the hosts that may get it."""
    keep_prompts: bool = False
    """Whether stages may keep requests and answers (``capture_io``)."""
    kept_prompt_bytes: int = Field(64 << 20, ge=1024, le=MOST_BODY_BYTES)
    kept_prompt_age_s: float = Field(3600.0, gt=0, le=MOST_S, allow_inf_nan=False)


class RayPoolTable(ConfigTable):
    """``[ray.pools.NAME]``: one pool on a Ray cluster; what is left out is that of ``[ray]``."""

    labels: dict[str, str] | None = None
    resources: dict[str, float] | None = None
    standbys: int | None = Field(None, ge=0, le=MOST_STANDBYS)


class RayTable(ConfigTable):
    """``[ray]``: what ``orla-lg serve --on ray`` runs, and on which nodes; other processes do not read it."""

    namespace: str = Field("orla", max_length=100, pattern=r"^[A-Za-z0-9_.-]+$")
    """Ray's, of the actors."""
    standbys: int = Field(1, ge=0, le=MOST_STANDBYS)
    """Beside each pool's core."""
    gateways: int = Field(0, ge=0, le=MOST_GATEWAYS)
    """Before all cores together, on any node."""
    labels: dict[str, str] = {}
    """That a node must have, as Ray selects: ``value``, ``!value``, ``in(a, b)`` or ``!in(a, b)``."""
    resources: dict[str, float] = {}
    """Ray's own resources that each actor takes, for nodes without labels."""
    num_cpus: float = Field(0.0, ge=0, le=1_000, allow_inf_nan=False)
    """That each actor takes of its node, by Ray's account."""
    pools: dict[str, RayPoolTable] = {}
    """By name, where a pool of ``[pools]`` differs."""


def _policy_names(said: Any) -> Any:
    """Check the name of a policy, or a table of them; what is neither, pydantic refuses."""
    names = said if isinstance(said, Mapping) else {"": said}
    for place, name in names.items():
        if not isinstance(name, str):
            raise ValueError(f"{shown(place)[1:-1] or 'it'} must be the name of a policy, or a table of names")
        if not is_object(name):
            policy(name)
    return said


def _policy_name(said: Any) -> Any:
    """Check the name of a policy for both levels, where a table would leave open what it is by."""
    if isinstance(said, Mapping):
        raise ValueError("one policy orders both levels: a table by backend is stage_policy, by stage request_policy")
    return _policy_names(said)


def _memory_name(said: Any) -> Any:
    if not isinstance(said, str):
        raise ValueError('it must be the name of a memory policy, or "module:name"')
    if not is_object(said):
        memory_policy(said)
    return said


def _mapping(said: Any) -> Any:
    """Check that it is a table, whose entries are checked by what it is built into, or names a mapper."""
    if not isinstance(said, Mapping) and not (isinstance(said, str) and is_object(said)):
        raise ValueError('it must be a table of backends by stage, or "module:name" of a mapper')
    return said


PolicyName = Annotated[str, BeforeValidator(_policy_name)]
PolicyNames = Annotated[str | dict[str, str], BeforeValidator(_policy_names)]
MappingTable = Annotated[dict[str, Any] | str, BeforeValidator(_mapping)]


class ConfigFile(ConfigTable):
    """The whole of ``orla.toml``."""

    backends: dict[str, BackendTable] = {}
    mapping: MappingTable = {}
    """Checked by what it is built into: ``core.mappers.table``."""
    load_aware: bool = False
    variants: dict[str, MappingTable] = {}
    policy: PolicyName | None = None
    """For both levels of the queues."""
    stage_policy: PolicyNames | None = None
    """For all backends, or by backend."""
    request_policy: PolicyNames | None = None
    """For all stages, or by stage."""
    memory: Annotated[str, BeforeValidator(_memory_name)] = "default"
    admission: bool = True
    keep_records: int = Field(10_000, ge=1, le=MOST_CALLS)
    records_file: str | None = Field(None, min_length=1)
    limits: dict[str, Any] = {}
    """Checked by what it is built into: ``core.limits``."""
    estimates_file: str | None = Field(None, min_length=1)
    control: str | None = Field(None, min_length=1)
    warm_up: bool = True
    untranslatable: Untranslated = "external"
    tags: dict[str, str] = {}
    """What access policies know calls by."""
    policies: tuple[PolicyTable, ...] = ()
    stages: dict[str, LabelTable] = {}
    pools: dict[str, tuple[str, ...]] = {}
    """By name, the backends that share a core; each is in exactly one."""
    serve: ServeTable | None = None
    ray: RayTable | None = None
