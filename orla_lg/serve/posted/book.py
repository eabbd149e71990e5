"""What was posted, as the store has it: read, written with its versions, bounded, watched.

Each item is one value, ``posted/<kind>/<name>``. What cannot be read (a newer version's field, a broken value) is
logged once and left out; what it may have restricted stays restricted: ``PostedItems.unreadable`` names it, and a
policy among them has the guard allow nothing until it is replaced or removed.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from orla_lg.errors import ConfigError, OrlaError, shown
from orla_lg.serve.posted.items import MODELS, PostedItem, PostedKind, PostedPolicy, read_item
from orla_lg.serve.store.store import Store, Versioned

log = logging.getLogger("orla_lg")

PREFIX = "posted/"
FORMAT = 1

MOST_ITEMS = 10_000
"""Of one kind."""

MOST_BACKENDS = 200
MOST_BYTES = 1 << 20
"""Of one item, as it is stored."""

MOST_TOTAL_BYTES = 64 << 20
"""Of all of them together."""

KINDS = frozenset(kind.value for kind in PostedKind)

T = TypeVar("T", bound=PostedItem)


class PostedFull(OrlaError):
    """There is no room for another item, or it is too large."""


@dataclass(frozen=True, slots=True)
class Posted(Generic[T]):
    """An item as it is stored."""

    item: T
    created_s: float
    """Seconds since 1970."""
    updated_s: float
    version: int
    """What a careful writer expects (``PostedBook.put``)."""


_EMPTY: Mapping[Any, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class PostedItems:
    """All items as they were at one moment; never changed."""

    by_kind: Mapping[PostedKind, Mapping[str, Posted[Any]]] = field(default_factory=lambda: _EMPTY)
    unreadable: Mapping[PostedKind, frozenset[str]] = field(default_factory=lambda: _EMPTY)
    """Names of those that cannot be read."""

    def of(self, model: type[T]) -> Mapping[str, Posted[T]]:
        """Return those of a kind by name, sorted."""
        return cast("Mapping[str, Posted[T]]", self.by_kind.get(model.kind_, _EMPTY))

    def get(self, model: type[T], name: str) -> Posted[T] | None:
        """Return one of them."""
        return self.of(model).get(name)

    def broken(self, kind: PostedKind) -> frozenset[str]:
        """Return the names of a kind's items that cannot be read."""
        return self.unreadable.get(kind, frozenset())

    def policies(self) -> tuple[PostedPolicy, ...]:
        """Return the policies that can be read; while one cannot, nothing is allowed (``guarding``)."""
        return tuple(each.item for each in self.of(PostedPolicy).values())

    def says_what(self, other: PostedItems) -> bool:
        """Whether both say the same, whenever and in whichever version."""
        return self.unreadable_names == other.unreadable_names and all(
            {name: each.item for name, each in self.by_kind.get(kind, _EMPTY).items()}
            == {name: each.item for name, each in other.by_kind.get(kind, _EMPTY).items()}
            for kind in PostedKind
        )

    @property
    def unreadable_names(self) -> set[tuple[PostedKind, str]]:
        """Kinds and names of those that cannot be read."""
        return {(kind, name) for kind, names in self.unreadable.items() for name in names}

    def with_item(self, item: T, *, version: int = 0, now_s: float = 0.0) -> PostedItems:
        """Return them with one more, or another one of its name."""
        before = self.get(type(item), item.key)
        stored = Posted(item, now_s if before is None else before.created_s, now_s, version)
        of_kind = dict(sorted({**self.of(type(item)), item.key: stored}.items()))
        broken = {**self.unreadable, item.kind_: self.broken(item.kind_) - {item.key}}
        return PostedItems({**self.by_kind, item.kind_: of_kind}, broken)

    def without(self, kind: PostedKind, name: str) -> PostedItems:
        """Return them without one."""
        of_kind = {each: stored for each, stored in self.by_kind.get(kind, _EMPTY).items() if each != name}
        broken = {**self.unreadable, kind: self.broken(kind) - {name}}
        return PostedItems({**self.by_kind, kind: of_kind}, broken)


class PostedBook:
    """The items in a store. Any thread may use it.

    Args:
        store: Where they are.
        own: Where backends are, of which each pool has its own; ``None``: with the others.
        clock: Seconds since 1970.
    """

    def __init__(self, store: Store, own: Store | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._store, self._own, self._clock = store, store if own is None else own, clock
        self._lock = threading.Lock()
        self._read: dict[str, tuple[int, int, Posted[Any] | None]] = {}
        """By key: the version that was read, its size, and what it says."""
        self.items = PostedItems()
        """As they were when they were last read (``refresh``), or written from here."""

    def refresh(self) -> bool:
        """Read what changed in the store; returns whether anything did.

        Raises:
            StoreUnavailable: It does not answer; what was read before stands.
        """
        with self._lock:
            return self._refresh()

    def _refresh(self) -> bool:
        found = self._store.scan(PREFIX)
        if self._own is not self._store:
            mine = key_of(PostedKind.BACKEND, "")
            found = {key: each for key, each in found.items() if not key.startswith(mine)} | self._own.scan(mine)
        if {key: each.version for key, each in found.items()} == {key: each[0] for key, each in self._read.items()}:
            return False
        self._read = {
            key: known
            if (known := self._read.get(key)) is not None and known[0] == value.version
            else (value.version, len(value.value), _read(key, value))
            for key, value in found.items()
        }
        self._arrange()
        return True

    def _arrange(self) -> None:
        by_kind: dict[PostedKind, dict[str, Posted[Any]]] = {kind: {} for kind in PostedKind}
        broken: dict[PostedKind, set[str]] = {kind: set() for kind in PostedKind}
        for key, (_, _, stored) in sorted(self._read.items()):
            said, _, name = key.removeprefix(PREFIX).partition("/")
            if said not in KINDS:
                continue
            if stored is None:
                broken[PostedKind(said)].add(name)
            else:
                by_kind[PostedKind(said)][name] = stored
        self.items = PostedItems(by_kind, {kind: frozenset(names) for kind, names in broken.items()})

    def put(self, item: T, *, expected: int | None = None) -> Posted[T]:
        """Write an item, and return it as it is stored now.

        Args:
            item: The item.
            expected: The version that is overwritten, ``ABSENT`` for none; ``None``: whichever there is.

        Raises:
            Conflict: There is another version.
            PostedFull: There are too many, or it is too large.
            StoreUnavailable: The store does not answer.
        """
        key = key_of(item.kind_, item.key)
        with self._lock:
            self._refresh()
            before = self.items.get(type(item), item.key)
            now_s = self._clock()
            created_s = now_s if before is None else before.created_s
            said = {
                "format": FORMAT, "created_s": created_s, "updated_s": now_s,
                "item": item.model_dump(mode="json", by_alias=True),
            }  # fmt: skip
            packed = json.dumps(said).encode()
            self._check_room(item, key, len(packed))
            version = self._of(item.kind_).put(key, packed, expected=expected)
            stored = Posted(item, created_s, now_s, version)
            self._read[key] = (version, len(packed), stored)
            self._arrange()
            return stored

    def remove(self, kind: PostedKind, name: str, *, expected: int | None = None) -> None:
        """Remove an item; one that is not there is no fault.

        Raises:
            Conflict: There is another version.
            StoreUnavailable: The store does not answer.
        """
        key = key_of(kind, name)
        with self._lock:
            self._of(kind).put(key, None, expected=expected)
            self._read.pop(key, None)
            self._arrange()

    def _check_room(self, item: PostedItem, key: str, size: int) -> None:
        if size > MOST_BYTES:
            raise PostedFull(f"{item.kind_} {shown(item.key)} takes {size} bytes; one has at most {MOST_BYTES}")
        others = [read for each, read in self._read.items() if each != key]
        of_kind = sum(each.startswith(key_of(item.kind_, "")) and each != key for each in self._read)
        most = MOST_BACKENDS if item.kind_ is PostedKind.BACKEND else MOST_ITEMS
        if of_kind >= most:
            raise PostedFull(f"there are {of_kind} {item.kind_} already, as many as there may be; delete some")
        if (total := size + sum(each[1] for each in others)) > MOST_TOTAL_BYTES:
            raise PostedFull(f"all that is posted would take {total} bytes; at most {MOST_TOTAL_BYTES} are kept")

    def watch(self, changed: Callable[[], None]) -> Callable[[], None]:
        """Call *changed*, from any thread, after items change in the store; returns what ends that."""
        ends = [self._store.watch(PREFIX, changed)]
        if self._own is not self._store:
            ends.append(self._own.watch(PREFIX, changed))

        def end() -> None:
            for each in ends:
                each()

        return end

    def _of(self, kind: PostedKind) -> Store:
        return self._own if kind is PostedKind.BACKEND else self._store


def key_of(kind: PostedKind, name: str) -> str:
    """Return where the store has an item."""
    return f"{PREFIX}{kind}/{name}"


def _read(key: str, value: Versioned) -> Posted[Any] | None:
    said, _, name = key.removeprefix(PREFIX).partition("/")
    if said not in KINDS:
        log.error("what was posted as %s is of no kind that this version knows, and is left out", shown(key))
        return None
    try:
        return _unpacked(MODELS[PostedKind(said)], name, value)
    except ConfigError as error:
        log.error("what was posted as %s cannot be read, and is left out: %s", shown(key), error)
        return None


def _unpacked(model: type[T], name: str, value: Versioned) -> Posted[T]:
    try:
        table = json.loads(value.value)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"it is no JSON: {error}") from None
    if not isinstance(table, dict) or set(table) != {"format", "created_s", "updated_s", "item"}:
        raise ConfigError("it is not written as this version writes it")
    times = table["created_s"], table["updated_s"]
    if table["format"] != FORMAT or not all(isinstance(each, int | float) for each in times):
        raise ConfigError(f"it is of format {shown(table['format'])}; this version knows {FORMAT}")
    if not isinstance(table["item"], dict):
        raise ConfigError("it holds no item")
    item = read_item(model, table["item"])
    if item.key != name:
        raise ConfigError(f"it calls itself {shown(item.key)}")
    return Posted(item, *times, value.version)
