"""Configuration: ``orla.toml`` or the environment, read once, checked whole, and every fault named.

The environment is read here (and ``ORLA_CONFIG``, a file, in ``config_file``) and nowhere below: ``ORLA_URL`` with
``ORLA_MODEL``, ``ORLA_ENGINE`` and ``ORLA_API_KEY`` (one backend without a file), ``ORLA_DISABLED=1`` (step aside),
``ORLA_CONTROL`` (a socket for ``orla-lg top``), ``ORLA_SERVER`` and ``ORLA_SERVER_KEY`` (a core in another process),
and the engines' keys, in the variables that a configuration or a server names.
"""

from __future__ import annotations

import json
import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import ValidationError

from orla_lg.clients.fitting import Untranslated
from orla_lg.config_faults import (
    check_entries,
    collected,
    faults_of_backends,
    faults_of_policies,
    faults_of_tables,
    found,
    limits_in,
    listed,
    policies_in,
    stages_in,
)
from orla_lg.config_file import CONFIG_NAME, find_file
from orla_lg.config_objects import Objects
from orla_lg.config_pools import faults_of_pools, pool_in
from orla_lg.config_tables import (
    BackendTable,
    ConfigFile,
    ConfigTable,
    CostTable,
    GatewayTable,
    LabelTable,
    PolicyTable,
    RayPoolTable,
    RayTable,
    ServeTable,
)
from orla_lg.core.boundary import checked, removed
from orla_lg.core.boundary.checked import dotted
from orla_lg.core.boundary.secret import Secret
from orla_lg.core.engine.backend import Backend, Cost
from orla_lg.core.guard.flow import StageLabels
from orla_lg.core.guard.policies import AccessPolicy
from orla_lg.core.guard.subject import checked_tags
from orla_lg.core.limits.limits import NO_LIMITS, Limits
from orla_lg.core.mapping import Mapper
from orla_lg.core.memory.events import MemoryPolicy
from orla_lg.core.memory.policies import memory_policy
from orla_lg.core.operation.policy_choice import PolicyChoice
from orla_lg.core.policies import RequestChoice, StageChoice, policy
from orla_lg.errors import NAME_CHARS, ConfigError, MappingError, did_you_mean, shown
from orla_lg.link.redis_keys import RedisAddress, is_shared
from orla_lg.mappers.table import Entry, stage_mapper

MOST_BYTES = 10_000_000
"""Of a configuration; what is larger is something else, and is not read."""

EXAMPLE = """\
[backends.light]
url = "http://127.0.0.1:8001/v1"
model = "Qwen/Qwen3-4B"
engine = "llamacpp"

[mapping]
"*" = "light"
"""


@dataclass(frozen=True, slots=True)
class Settings:
    """What an ``Orla`` is built from."""

    backends: tuple[Backend, ...]
    mapping: Mapping[str, Entry] | Mapper
    policy: PolicyChoice | None = None
    """For both levels of the queues; the two below say where a level has another one."""
    stage_policy: StageChoice | None = None
    request_policy: RequestChoice | None = None
    memory: str | MemoryPolicy = "default"
    admission: bool = True
    keep_records: int = 10_000
    load_aware: bool = False
    """Calls leave a saturated backend for an alternative of their mapping."""
    variants: Mapping[str, Mapping[str, Entry] | Mapper] = field(default_factory=dict)
    records_file: Path | None = None
    limits: Limits = NO_LIMITS
    estimates_file: Path | None = None
    control: Path | Literal[False] | None = None
    """A socket for ``orla-lg top``; ``False``: none, whatever the environment says."""
    warm_up: bool = True
    """Prompts are prefilled before their calls come."""
    untranslatable: Untranslated = "external"
    """What becomes of a request that cannot be translated for its backend."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """What access policies know calls by."""
    policies: tuple[AccessPolicy, ...] = ()
    stages: Mapping[str, StageLabels] = field(default_factory=dict)
    """What is said of stages' data, by name."""
    serve: ServeTable | None = None
    """How ``orla-lg serve`` is reached; its files as seen from the configuration."""
    ray: RayTable | None = None
    """What ``orla-lg serve --on ray`` runs."""
    pools: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """By name, the backends that share a core; none: one core has them all."""
    pool: str = ""
    """That this is for: its backends are ``backends`` then; empty: all are."""
    elsewhere: tuple[Backend, ...] = ()
    """Those of the other pools, without their keys."""
    written: Mapping[str, Any] = field(default_factory=dict)
    """The same as it stands in the file, with what is left out: two of them show what was changed."""
    source: str = ""

    def faults(self, names: Iterable[str] | None = None) -> list[ConfigError | MappingError]:
        """Return what is wrong between its parts; *names* are those of all backends, if there are more than these."""
        known = [backend.name for backend in (*self.backends, *self.elsewhere)] if names is None else list(names)
        return [
            *faults_of_backends(self.backends),
            *map(ConfigError, faults_of_policies(self.stage_policy, known)),
            *faults_of_tables(self.mapping, self.variants, known),
        ]


ENVIRONMENT = "the environment"
"""What ``Settings.source`` says where no file was read."""


def disabled() -> bool:
    """Whether ``ORLA_DISABLED`` asks us to step aside."""
    return os.environ.get("ORLA_DISABLED", "").lower() not in ("", "0", "false", "no")


SERVER, SERVER_KEY = "ORLA_SERVER", "ORLA_SERVER_KEY"


class Server(NamedTuple):
    """A core in another process."""

    url: str
    key: str | None


def server() -> Server | None:
    """Return the server that ``ORLA_SERVER`` names; it goes before any configuration of backends."""
    url = os.environ.get(SERVER)
    return Server(url, server_key()) if url else None


def server_key() -> str | None:
    """Return the key in ``ORLA_SERVER_KEY``; empty counts as none."""
    return os.environ.get(SERVER_KEY) or None


def key_in(variable: str) -> str | None:
    """Return the key in an environment variable; ``None`` where there is none."""
    try:
        return os.environ.get(variable) or None
    except ValueError:  # no variable can have such a name
        return None


def control(given: str | Path | Literal[False] | None) -> Path | None:
    """Return where the control socket is to be: as *given*, else as ``ORLA_CONTROL`` says.

    Raises:
        ConfigError: It is no path.
    """
    if given is None:
        named = os.environ.get("ORLA_CONTROL")
        return checked.path("ORLA_CONTROL", named) if named else None
    return None if given is False else checked.path("control", given)


def load(path: str | Path, *, pool: str | None = None) -> Settings:
    """Read a configuration file.

    Args:
        path: The file.
        pool: Whose core is built from it; ``None``: what is built serves all backends, whichever pools there are.

    Raises:
        ConfigError: Naming the file, the line or key, what was found and what is allowed.
    """
    file = checked.path("the configuration's file", path)
    try:
        return _settings(_parsed(file), str(file), pool)
    except RecursionError:
        raise ConfigError(f"{file}: its tables or lists are nested too deeply") from None


def _parsed(file: Path) -> dict[str, Any]:
    try:
        with file.open("rb") as opened:
            text = opened.read(MOST_BYTES + 1)
        if len(text) > MOST_BYTES:
            raise ConfigError(f"{file}: has more than {MOST_BYTES} bytes; that is no configuration")
        return tomllib.loads(text.decode("utf-8-sig"))
    except ConfigError:
        raise
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error.strerror}); a minimal file is:\n\n{EXAMPLE}") from error
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{file}: not valid TOML: {_syntax(str(error), text.decode('utf-8-sig'))}") from error
    except ValueError as error:
        raise ConfigError(f"{file}: not valid TOML: {str(error)[:NAME_CHARS]}") from error


_PLACE = re.compile(r"\(at line (\d+), column (\d+)\)$")
_BARE = re.compile(r"[^\s\"'\[\]{},#=][^\"'\[\]{},#=]*")
_PYTHON = {"True": "true", "False": "false"}


def _syntax(fault: str, text: str) -> str:
    """Return what is wrong with a file's TOML; of a text without quotes, how it is written right."""
    place = _PLACE.search(fault)
    line = "" if place is None else [*text.split("\n"), ""][int(place[1]) - 1]
    bare = None if place is None else _BARE.match(line, int(place[2]) - 1)
    if bare is None or not fault.startswith("Invalid value"):
        return fault[:NAME_CHARS]
    word, before = bare[0].strip(), line[: bare.start()].lstrip()
    if word in _PYTHON:
        return f"{fault}: TOML writes {before}{_PYTHON[word]}"[:NAME_CHARS]
    if word == "None":
        return f"{fault}: TOML has no None; leave the key out"
    return f"{fault}: a text stands in quotes: {before}{json.dumps(word, ensure_ascii=False)}"[: 2 * NAME_CHARS]


def _settings(parsed: Mapping[str, Any], source: str, pool: str | None = None) -> Settings:
    """Return what a configuration says, to the core of a pool if one is given.

    Raises:
        ConfigError: Naming all faults that show without asking an engine.
    """
    faults: list[str] = []
    table = _table(parsed, faults)
    if (
        not parsed.get("backends")
        and "serve" not in parsed
        and not any(each.startswith("backends") for each in faults)
    ):
        faults.append("backends: missing; at least one [backends.NAME]")
    faults += faults_of_pools(table.pools, _backend_names(parsed))
    chosen, mine = pool_in(faults, table, pool), set(table.backends)
    if chosen:
        mine &= set(table.pools[chosen])
    backends = collected(
        faults, (partial(_backend, *each, has_key=each[0] in mine) for each in table.backends.items())
    )
    check_entries(faults, table.mapping, table.variants)
    if table.load_aware and not table.mapping:
        faults.append("load_aware: there is no [mapping] whose calls could be moved")
    files = [found(faults, partial(_beside, name, source, getattr(table, name))) for name in _FILES]
    settings = Settings(
        tuple(each for each in backends if each.name in mine),
        source=source,
        pools=table.pools,
        pool=chosen,
        elsewhere=tuple(each for each in backends if each.name not in mine),
        limits=limits_in(faults, table.limits),
        records_file=files[0],
        estimates_file=files[1],
        control=files[2],
        tags=found(faults, partial(checked_tags, "tags", table.tags)) or {},
        policies=policies_in(faults, [each.model_dump() for each in table.policies]),
        stages=stages_in(faults, {name: each.model_dump() for name, each in table.stages.items()}),
        serve=_serve(faults, source, table.serve),
        ray=table.ray,
        written=table.model_dump(),
        **_objects(faults, source, table),
        **table.model_dump(include=_AS_THEY_ARE),
    )
    if faults:
        raise ConfigError(listed(source, [*faults, *settings.faults(_backend_names(parsed))]))
    return settings


DEFAULTS: Mapping[str, Any] = ConfigFile.model_validate({}).model_dump()
"""What a file says that says nothing."""

_FILES = ("records_file", "estimates_file", "control")
_AS_THEY_ARE = {"admission", "keep_records", "load_aware", "warm_up", "untranslatable"}


def _objects(faults: list[str], source: str, table: ConfigFile) -> dict[str, Any]:
    """Return the keys whose values may be of the user's own code."""
    objects = Objects(Path(source).parent, faults)

    def mapping(where: str, said: Any) -> Any:
        return objects.named(where, said, stage_mapper) if isinstance(said, str) else said

    return {
        "mapping": mapping("mapping", table.mapping),
        "variants": {name: mapping(dotted("variants", name), each) for name, each in table.variants.items()},
        "memory": objects.named("memory", table.memory, memory_policy),
        **{level: objects.among(level, getattr(table, level), policy) for level in _LEVELS},
    }


_LEVELS = ("policy", "stage_policy", "request_policy")


def _serve(faults: list[str], source: str, table: ServeTable | None) -> ServeTable | None:
    """Return ``[serve]`` with its files as seen from the configuration."""
    if table is None:
        return None
    files = {name: getattr(table, name) for name in ("store", "tls_cert", "tls_key")}
    if is_shared(table.store):
        del files["store"]
        found(faults, partial(RedisAddress.parse, table.store, "serve.store"))
    beside = {name: found(faults, partial(_beside, f"serve.{name}", source, each)) for name, each in files.items()}
    if (table.tls_cert is None) != (table.tls_key is None):
        faults.append("serve: tls_cert and tls_key belong together; one of them is missing")
    if table.core_lease_s > table.replica_lease_s:
        faults.append(
            f"serve.core_lease_s: found {table.core_lease_s:g}; at most replica_lease_s, {table.replica_lease_s:g}: "
            "a replica must outlive the time that the next core takes to come"
        )
    return table.model_copy(update={name: None if file is None else str(file) for name, file in beside.items()})


def _table(parsed: Mapping[str, Any], faults: list[str]) -> ConfigFile:
    """Return what is as it should be, and note what is not: a table of a backend, or a whole key, is left out."""
    try:
        return ConfigFile.model_validate(parsed)
    except ValidationError as error:
        wrong_ones: list[dict[str, Any]] = [dict(fault) for fault in error.errors()]
    faults += [_fault(fault) for fault in wrong_ones]
    wrong = {tuple(fault["loc"][: 2 if fault["loc"][:1] == ("backends",) else 1]) for fault in wrong_ones}
    sound = {key: value for key, value in parsed.items() if (key,) not in wrong}
    if isinstance(tables := sound.get("backends"), Mapping):
        sound["backends"] = {name: each for name, each in tables.items() if ("backends", name) not in wrong}
    return ConfigFile.model_validate({key: each for key, each in sound.items() if key in ConfigFile.model_fields})


def _backend_names(parsed: Mapping[str, Any]) -> list[str]:
    """Return the names of all backends, those with faults among them."""
    tables = parsed.get("backends")
    return [str(name) for name in tables] if isinstance(tables, Mapping) else []


def _beside(where: str, source: str, said: str | None) -> Path | None:
    """Return a file named in a configuration, as seen from there."""
    if said is None:
        return None
    return Path(source).parent / checked.path(where, said)


def _backend(name: str, table: BackendTable, *, has_key: bool = True) -> Backend:
    given = table.model_dump(exclude={"api_key_env", "admin_key_env", "cost"})
    return Backend(
        name=name,
        api_key=_key(dotted("backends", name, "api_key_env"), table.api_key_env if has_key else None),
        admin_key=_key(dotted("backends", name, "admin_key_env"), table.admin_key_env if has_key else None),
        cost=Cost(**table.cost.model_dump()),
        **given,
    )


def _key(where: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = key_in(variable)
    if not key:
        raise ConfigError(f"{where}: the environment variable {shown(variable)} is not set")
    return Secret(key, f"{where}: the key in {shown(variable)}").reveal()  # checked here, where its variable is known


OF_WRAP = ("hints", "split_prompts", "tools_safe", "tools_safe_mcp")
"""What only ``Orla.wrap`` takes, for its graph."""


def _fault(fault: dict[str, Any]) -> str:
    """Return one fault as ``key: what was found, what is allowed``."""
    *above, last = fault["loc"] or ("",)
    key = dotted(*above, last)
    if fault["type"] == "extra_forbidden":
        if last in OF_WRAP:
            return f"{key}: it is no key of a configuration; it belongs to the graph: orla.wrap(graph, {last}=…)"
        return f"{key}: {removed.reason('key', last) or 'unknown key' + did_you_mean(last, _allowed(above))}"
    if fault["type"] == "missing":
        return f"{key}: missing"
    ours = fault.get("ctx", {}).get("error")  # raised by us; pydantic's message puts "Value error, " before it
    return f"{key}: found {shown(fault['input'])}; {fault['msg'] if ours is None else ours}"


def _allowed(above: list[Any]) -> list[str]:
    """Return the keys allowed in the table at *above*."""
    table: type[ConfigTable] = ConfigFile
    if above and above[0] == "serve":
        table = (ServeTable, GatewayTable)[len(above) > 1]
    elif above and above[0] == "ray":
        table = (RayTable, RayPoolTable)[len(above) > 2]
    elif above and above[0] == "backends":
        table = (BackendTable, CostTable)[len(above) > 2]
    elif above:
        table = PolicyTable if above[0] == "policies" else LabelTable
    return list(table.model_fields)


class NoConfiguration(ConfigError):
    """Nothing says where a configuration is."""

    def __init__(self, why: str) -> None:
        super().__init__(f"no configuration: {why}. A minimal {CONFIG_NAME}:\n\n{EXAMPLE}")
        self.why = why


def find() -> Settings:
    """Find the configuration: ``ORLA_CONFIG``, ``orla.toml`` here or above, ``ORLA_URL``.

    Raises:
        ConfigError: None of these is there, or what is there is wrong.
    """
    if (file := find_file()) is not None:
        return load(file)
    if url := os.environ.get("ORLA_URL"):
        return _from_variables(url)
    raise NoConfiguration(
        f"ORLA_CONFIG is not set, there is no {CONFIG_NAME} in {Path.cwd()} or above, and ORLA_URL is not set"
    )


def _from_variables(url: str) -> Settings:
    model, key = os.environ.get("ORLA_MODEL"), os.environ.get("ORLA_API_KEY")
    try:
        backend = Backend("default", url, model, os.environ.get("ORLA_ENGINE", "openai"), key)
    except ConfigError as error:
        raise ConfigError(f"{ENVIRONMENT}: {error}") from error
    return Settings((backend,), {"*": "default"}, source=ENVIRONMENT)
