"""The server's keys: what each allows, in the store; of a key itself only its SHA-256.

A key is 256 random bits, so nothing is gained by a slow hash. It is shown once, when it is made. What is stored of it
finds it again and proves nothing by itself: a copy of the store lets no one in.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import logging
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from enum import StrEnum
from fnmatch import fnmatchcase
from typing import Any

from orla_lg.core.boundary import checked
from orla_lg.core.boundary.masking import SERVER_KEY_CHARS, SERVER_KEY_PREFIX
from orla_lg.core.limits.limits import Limit
from orla_lg.errors import ConfigError, did_you_mean, shown
from orla_lg.serve.store.store import ABSENT, Store, StoreUnavailable, Versioned

log = logging.getLogger("orla_lg")

PREFIX = "keys/"
"""Of keys in the store; the key's id follows."""

SECRET_BYTES, ID_BYTES = 32, 5

RETRY_S = 0.25
"""A store that could not be read is read again so soon."""

ANY = "*"


class KeyScope(StrEnum):
    """What a key is for."""

    USE = "use"
    """Calls of models: the gateway's routes."""
    LINK = "link"
    """Links of wrapped graphs: trusted applications of the operator."""
    GATEWAY = "gateway"
    """Links of gateways (``orla-lg serve --gateway``), which make calls in the names of all keys; links too."""
    VIEW = "view"
    """What shows all tenants: the live page, the state, metrics, statistics."""
    CONTROL = "control"
    """What changes the server."""


@dataclass(frozen=True, slots=True)
class AccessKey:
    """What is known of a key.

    Raises:
        ConfigError: A value is not allowed; naming the field.
    """

    id: str
    """Names the key; no secret."""
    name: str
    """For people; several keys may have it, so that one can take another one's place."""
    sha256: str = field(repr=False)
    """Of the key, as hexadecimal digits."""
    scopes: tuple[KeyScope, ...] = (KeyScope.USE,)
    tenants: tuple[str, ...] | None = ()
    """Whose calls it makes; none: no tenant's; ``None``: any that a call names."""
    tags: Mapping[str, str] = field(default_factory=dict)
    """On each of its calls; a caller may add others, and contradict none."""
    backends: tuple[str, ...] | None = None
    """Patterns (``*``, ``?``) of those that its calls may go to; ``None``: all."""
    stages: tuple[str, ...] | None = None
    """Patterns of those that its calls may be of; ``None``: all."""
    limits: tuple[Limit, ...] = ()
    """What its calls may use together; all of them hold."""
    concurrency: int | None = None
    """How many of its calls may be in the server at once; ``None``: any number."""
    created_s: float = 0.0
    """Seconds since 1970, as the others."""
    expires_s: float | None = None
    revoked_s: float | None = None

    def __post_init__(self) -> None:
        for name in ("id", "name", "sha256"):
            checked.text(name, getattr(self, name))
        for name in ("tenants", "backends", "stages"):
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, checked.texts(name, given))
        if not isinstance(self.tags, Mapping):
            raise ConfigError(f"tags: expected a table of texts, got {shown(self.tags)}")
        for tag, value in self.tags.items():
            checked.text("tags: each name", tag)
            checked.text(checked.dotted("tags", tag), value, empty=True)
        for scope in self.scopes:
            checked.choice("scopes: each of them", scope, [*KeyScope])
        if not self.scopes:
            raise ConfigError("scopes: a key without any allows nothing; name one of " + ", ".join(KeyScope))
        object.__setattr__(self, "scopes", tuple(KeyScope(scope) for scope in self.scopes))
        if self.concurrency is not None:
            checked.whole("concurrency", self.concurrency, least=1)
        for name in ("created_s", "expires_s", "revoked_s"):
            if (given := getattr(self, name)) is not None:
                checked.number(name, given, least=0)

    def has(self, scope: KeyScope) -> bool:
        """Whether it is for something."""
        return scope in self.scopes or (scope is KeyScope.LINK and KeyScope.GATEWAY in self.scopes)

    def fault(self, now_s: float) -> str | None:
        """Return why it lets nothing in; ``None`` where it does."""
        if self.revoked_s is not None:
            return "was revoked"
        return "expired" if self.expires_s is not None and self.expires_s <= now_s else None

    def state(self, now_s: float) -> str:
        """Return ``valid``, ``expired`` or ``revoked``."""
        return "revoked" if self.revoked_s is not None else self.fault(now_s) or "valid"

    def as_dict(self) -> dict[str, Any]:
        """Return all but what finds it, for ``keys show`` and ``keys list``."""
        found = asdict(self)
        del found["sha256"]
        found["limits"] = [_limit_as_dict(limit) for limit in self.limits]
        return found

    def pack(self) -> bytes:
        """Return it as the store keeps it."""
        return json.dumps({**self.as_dict(), "sha256": self.sha256}).encode()

    @classmethod
    def unpack(cls, packed: bytes) -> AccessKey:
        """Return what ``pack`` packed.

        Raises:
            ConfigError: It is no key, or has a field that this version does not know: that may be a restriction.
        """
        try:
            table = json.loads(packed)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"it is no JSON: {error}") from None
        known = [each.name for each in fields(cls)]
        if not isinstance(table, dict) or not {"id", "name", "sha256"} <= table.keys():
            raise ConfigError("it is no table with id, name and sha256")
        if unknown := [name for name in table if name not in known]:
            raise ConfigError(f"unknown field {shown(unknown[0])}{did_you_mean(unknown[0], known)}")
        limits = table.get("limits", [])
        if not isinstance(limits, list) or not all(isinstance(each, dict) for each in limits):
            raise ConfigError(f"limits: expected a list of tables, got {shown(limits)}")
        if not isinstance(table.get("scopes", []), list):
            raise ConfigError(f"scopes: expected a list, got {shown(table['scopes'])}")
        try:
            return cls(**{**table, "limits": tuple(Limit(**each) for each in limits)})
        except TypeError as error:
            raise ConfigError(str(error)) from None


def _limit_as_dict(limit: Limit) -> dict[str, Any]:
    return {name: value for name, value in asdict(limit).items() if value is not None}


def allows(patterns: Sequence[str] | None, name: str) -> bool:
    """Whether a name is among those that a key allows; ``None`` allows all."""
    return patterns is None or any(name == pattern or fnmatchcase(name, pattern) for pattern in patterns)


def digest(key: str) -> str:
    """Return what is stored of a key."""
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()


def is_shaped(key: str) -> bool:
    """Whether a text looks like one of our keys; what does not is not looked up."""
    return len(key) == len(SERVER_KEY_PREFIX) + SERVER_KEY_CHARS and key.startswith(SERVER_KEY_PREFIX)


def _random(count: int) -> str:
    return base64.b32encode(secrets.token_bytes(count)).decode().rstrip("=").lower()


# In the store


def create(store: Store, key: Callable[[str, str], AccessKey]) -> tuple[AccessKey, str]:
    """Make a key, store what is to be known of it, and return that with the key itself, which is nowhere else.

    Args:
        store: Where keys are.
        key: Makes the ``AccessKey`` of an id and a hash.
    """
    secret = SERVER_KEY_PREFIX + _random(SECRET_BYTES)
    made = key(_random(ID_BYTES), digest(secret))
    store.put(PREFIX + made.id, made.pack(), expected=ABSENT)
    return made, secret


def stored(store: Store) -> list[AccessKey]:
    """Return all keys, the oldest first; what is no key is logged and left out."""
    return _read_all(store.scan(PREFIX))


def _read_all(entries: Mapping[str, Versioned]) -> list[AccessKey]:
    found: list[AccessKey] = []
    for name, entry in entries.items():
        try:
            found.append(AccessKey.unpack(entry.value))
        except ConfigError as error:
            log.warning("%s in the store is not heeded, and lets nothing in: %s", shown(name), error)
    return sorted(found, key=lambda key: (key.created_s, key.id))


def named(store: Store, name: str) -> AccessKey:
    """Return the key of an id, or the only one of a name.

    Raises:
        ConfigError: There is none, or there are several of that name.
    """
    keys = stored(store)
    if found := [key for key in keys if key.id == name]:
        return found[0]
    alike = [key for key in keys if key.name == name]
    if len(alike) > 1:
        valid = [key for key in alike if key.revoked_s is None]
        if len(valid) == 1:
            return valid[0]
        raise ConfigError(f"{len(alike)} keys are named {shown(name)}; name one by id: "
                          f"{', '.join(key.id for key in alike)}")  # fmt: skip
    if not alike:
        if is_shaped(name):
            raise ConfigError("that is a key itself, not for a command line; name it by its id or name")
        names = {word for key in keys for word in (key.id, key.name)}
        raise ConfigError(f"no key has the id or name {shown(name)}{did_you_mean(name, names)}")
    return alike[0]


def revoke(store: Store, key: AccessKey, now_s: float) -> AccessKey:
    """Have a key let nothing in any more. Idempotent: the first time counts."""
    value = store.get(PREFIX + key.id)
    if value is None:
        raise ConfigError(f"key {key.id} is gone")
    known = AccessKey.unpack(value.value)
    if known.revoked_s is not None:
        return known
    known = replace(known, revoked_s=now_s)
    store.put(PREFIX + key.id, known.pack(), expected=value.version)
    return known


def forget(store: Store, key: AccessKey) -> None:
    """Remove all that is known of a key; it lets nothing in any more. Idempotent."""
    store.put(PREFIX + key.id, None)


# In a running server


class Keyring:
    """The keys as a running server knows them, as they are in the store up to a second ago.

    Args:
        store: Where they are.
        clock: Seconds since 1970.

    Raises:
        StoreUnavailable: They cannot be read.
    """

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self.clock = store, clock
        self._lock = threading.Lock()
        self._by_digest: Mapping[str, AccessKey] = {}
        self._by_id: Mapping[str, AccessKey] = {}
        self._retry_s: float | None = None
        """When to read again, monotonic, after the store could not be read."""
        self.any = False
        """Whether a key exists; one that expired or was revoked does."""
        self._read()
        self._end = store.watch(PREFIX, self._changed)
        self._changed()  # what came in between

    def _read(self) -> None:
        with self._lock:
            packed = self._store.scan(PREFIX)
            keys = _read_all(packed)
            self._by_digest = {key.sha256: key for key in keys}
            self._by_id = {key.id: key for key in keys}
            self.any = bool(packed)  # also one that cannot be read: it is there to keep others out
            self._retry_s = None

    def _changed(self) -> None:
        try:
            self._read()
        except StoreUnavailable as error:
            if self._retry_s is None:
                log.warning("the server's keys cannot be read now, and are what they were: %s", error)
            self._retry_s = time.monotonic() + RETRY_S

    def _look(self) -> None:
        if self._retry_s is not None and time.monotonic() >= self._retry_s:
            self._changed()

    def find(self, secret: str) -> AccessKey | None:
        """Return what is known of a key; ``None`` where it is none of ours."""
        if self._retry_s is not None:
            self._look()
        if not is_shaped(secret):
            return None
        sought = digest(secret)
        found = self._by_digest.get(sought)
        # Time tells at most how a hash compares, which says nothing of the key; not even that is to be learned.
        return found if found is not None and hmac.compare_digest(found.sha256, sought) else None

    def of_digest(self, sha256: str) -> AccessKey | None:
        """Return the key whose hash a gateway was sent; ``None`` where it is none of ours."""
        if self._retry_s is not None:
            self._look()
        return self._by_digest.get(sha256)

    def by_id(self, key_id: str) -> AccessKey | None:
        """Return what is known now of a key that was found before; ``None`` where it was removed."""
        if self._retry_s is not None:
            self._look()
        return self._by_id.get(key_id)

    def close(self) -> None:
        """Follow the store no longer. Idempotent."""
        self._end()
