"""Slots' contents on the engine's disk: which workflow is saved under which name, and which names are free again.

llama.cpp writes a slot to a file and reads it back into any slot, after a restart too. It deletes nothing. So
names come from a bounded pool of our own, the same ones after a restart of ours, and each holds one of

=========  ====================================================================================
free       nothing of use: never used, or a file that was emptied
stale      a file with what was flushed, forgotten or badly written: used first, else emptied
emptying   a stale one whose file is being overwritten with an empty slot (40 bytes remain)
an entry   what a workflow had in a slot; not ``ready`` while it is being written
=========  ====================================================================================

What another engine wrote into the same folder may be *borrowed* for a workflow that was moved here: it is read once.

An entry ends when its workflow is flushed, when it is too old, when it could not be read, or when its name is
wanted for something worth more. A file's tokens are in the file: whatever lies under a name, the engine reuses no
more of it than a prompt really begins with. All methods are called under the backend's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from zlib import crc32

from orla_lg.core.cache.verification import WHOLE
from orla_lg.core.call import in_common
from orla_lg.core.memory.events import Doing

MAX_AGE_S = 3 * 86_400.0
"""A weekend; an entry that is not used in that time is forgotten."""


class _Name(StrEnum):
    FREE = "free"
    STALE = "stale"
    EMPTYING = "emptying"


@dataclass(eq=False, slots=True)
class Saved:
    """What a workflow had in a slot, as a file."""

    name: str
    owner: str
    prefix: tuple[int, ...]
    """Chained message hashes of the slot's last prompt."""
    tokens: int
    doing: Doing | None
    """What its workflow does."""
    used_s: float = 0.0
    """When it was last saved or restored; monotonic seconds."""
    ready: bool = False
    readers: int = 0
    loaded: bool = False
    """A slot holds it too: of all entries it is missed least."""
    dropped: bool = False
    """Its workflow was flushed while it was written or read."""

    @property
    def still(self) -> bool:
        """Whether the engine is neither writing nor reading it."""
        return self.ready and not self.readers

    def is_whole(self, tokens: int | None) -> bool:
        """Whether so many tokens, as the engine counted when it saved them, may be what was to be saved."""
        return tokens is None or tokens >= WHOLE * self.tokens

    def covers(self, prompt: Sequence[int]) -> float:
        """Return about how many tokens of a prompt, as chained message hashes, it holds."""
        return covered(self.prefix, self.tokens, prompt)


class SavedPool:
    """The names of one backend.

    Args:
        instance: What all names begin with; two backends that save into one folder must differ in it.
        most: How many names there are, and so files at most.
        max_age_s: For how long an unused entry is kept, in seconds.
    """

    def __init__(self, instance: str, most: int, max_age_s: float = MAX_AGE_S) -> None:
        self._entries: dict[str, Saved] = {}
        self._names = {f"orla-{instance}-{number}": _Name.FREE for number in range(most)}
        """Those that are no entry's, lowest number first while unused."""
        self._most = most
        self._max_age_s = max_age_s
        self.weights = ""
        """That what is saved fits to."""
        self._borrowed: dict[str, Saved] = {}
        """By name, what another engine of the folder wrote of a workflow that was moved here; never written to."""
        self._lenders: dict[str, Callable[[], None]] = {}
        """By the same names: called when they are not needed any more."""
        self.changes = 0
        """How often something changed that an entry's value may depend on."""

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def tokens(self) -> int:
        """All that is saved, in tokens."""
        return sum(entry.tokens for entry in self._entries.values() if entry.ready)

    # Finding

    def find(self, owner: str, covers: Callable[[Saved], float]) -> Saved | None:
        """Return the workflow's entry that covers most; ``None`` if none covers anything."""
        own = [each for each in self._all() if each.owner == owner and each.ready and not each.dropped]
        best = max(own, key=covers, default=None)
        return None if best is None or covers(best) <= 0 else best

    def _all(self) -> list[Saved]:
        return [*self._entries.values(), *self._borrowed.values()] if self._borrowed else list(self._entries.values())

    def has(self, entry: Saved) -> bool:
        """Whether an entry is still one of these."""
        return self._entries.get(entry.name) is entry or self._borrowed.get(entry.name) is entry

    def copy_of(self, owner: str, prefix: tuple[int, ...]) -> Saved | None:
        """Return the entry that holds exactly a slot's last prompt; ``None`` if it is not saved."""
        return self.find(owner, lambda entry: entry.prefix == prefix)

    # Writing

    def can_take(self, owner: str, prefix: tuple[int, ...], value: float, least: float) -> bool:
        """Whether something of that value would find a name, where *least* is what ``least_value`` says."""
        return least < value or self._at_no_cost(owner, prefix) is not None

    def least_value(self, value_of: Callable[[Saved], float]) -> float:
        """Return the value of the entry that goes first when names run out; that of a loaded one is below all."""
        values = (-inf if entry.loaded else value_of(entry) for entry in self._entries.values() if entry.still)
        return min(values, default=inf)

    def begin_writing(
        self,
        owner: str,
        prefix: tuple[int, ...],
        tokens: int,
        doing: Doing | None,
        value: float,
        value_of: Callable[[Saved], float],
    ) -> Saved | None:
        """Give a name to what is to be saved; ``None`` where every name holds something worth more.

        Args:
            owner: The slot's workflow.
            prefix: The slot's last prompt as chained message hashes.
            tokens: How much.
            doing: What its owner does.
            value: What it is worth, in seconds.
            value_of: The same of an entry.
        """
        name = self._victim(owner, prefix, value, value_of)
        if name is None:
            return None
        self.changes += 1
        self._names.pop(name, None)
        self._entries[name] = Saved(name, owner, prefix, tokens, doing)
        return self._entries[name]

    def _victim(
        self, owner: str, prefix: tuple[int, ...], value: float, value_of: Callable[[Saved], float]
    ) -> str | None:
        """Return the name to write to: one that costs nothing, else that of what is worth least."""
        name = self._at_no_cost(owner, prefix)
        if name is not None:
            return name
        still = (entry for entry in self._entries.values() if entry.still)
        least = min(still, key=lambda entry: (not entry.loaded, value_of(entry)), default=None)
        return None if least is None or not (least.loaded or value_of(least) < value) else least.name

    def _at_no_cost(self, owner: str, prefix: tuple[int, ...]) -> str | None:
        """Return a name that costs nothing: the workflow's own that this continues, else an unused one."""
        for entry in self._entries.values():
            if entry.owner == owner and entry.still and prefix[: len(entry.prefix)] == entry.prefix:
                return entry.name
        for state in (_Name.STALE, _Name.FREE):
            if (name := next((name for name, is_ in self._names.items() if is_ is state), None)) is not None:
                return name
        return None

    def written(self, entry: Saved, now: float, *, ok: bool) -> None:
        """Note how the engine's writing went; what failed may have left half a file."""
        self.changes += 1
        entry.ready, entry.used_s = True, now
        if entry.dropped or not ok:
            self._forget(entry)

    # Reading

    def begin_reading(self, entry: Saved) -> None:
        """Keep the entry's name from being written to meanwhile."""
        self.changes += 1
        entry.readers += 1

    def read(self, entry: Saved, now: float, *, ok: bool) -> None:
        """Note how the engine's reading went. What failed is kept: the engine may just have been away."""
        self.changes += 1
        entry.readers -= 1
        entry.used_s = now
        entry.loaded = entry.loaded or ok
        if entry.still and (entry.dropped or (ok and entry.name in self._lenders)):
            self._forget(entry)

    def unloaded(self, owner: str | None = None) -> None:
        """Note that what was read to slots is no more there: one workflow's, or all."""
        self.changes += 1
        for entry in self._entries.values():
            entry.loaded = entry.loaded and owner is not None and entry.owner != owner

    def turned(self, owner: str, doing: Doing) -> None:
        """Note what a workflow does now."""
        self.changes += 1
        for entry in self._entries.values():
            if entry.owner == owner:
                entry.doing = doing

    # Borrowing

    def borrow(self, entry: Saved, ended: Callable[[], None]) -> None:
        """Let an entry be restored once whose file is another engine's, in the place of one that was borrowed before.

        Args:
            entry: Ready to be read.
            ended: Called when it was, or is of no use any more.
        """
        self._drop(lambda each: each.owner == entry.owner and each.name in self._lenders)
        if entry.name in self._borrowed:  # the same file is being read; that is as good
            ended()
            return
        self.changes += 1
        self._borrowed[entry.name], self._lenders[entry.name] = entry, ended

    # Forgetting

    def drop(self, owner: str) -> int:
        """Forget a workflow's entries; returns how many."""
        return self._drop(lambda entry: entry.owner == owner)

    def drop_one(self, entry: Saved) -> None:
        """Forget an entry that could not be read."""
        self._drop(lambda each: each is entry)

    def fits(self, weights: str) -> None:
        """Forget everything if the engine now serves other weights than those it was saved with."""
        if weights != self.weights:
            self._drop(lambda entry: True)
        self.weights = weights

    def expire(self, now: float) -> int:
        """Forget what is too old."""
        return self._drop(lambda entry: entry.still and now - entry.used_s > self._max_age_s)

    def _drop(self, which: Callable[[Saved], bool]) -> int:
        dropped = [entry for entry in self._all() if not entry.dropped and which(entry)]
        for entry in dropped:
            entry.dropped = True
            if entry.still:
                self._forget(entry)
        return len(dropped)

    def _forget(self, entry: Saved) -> None:
        self.changes += 1
        if self._borrowed.get(entry.name) is entry:
            del self._borrowed[entry.name]
            self._lenders.pop(entry.name)()
            return
        del self._entries[entry.name]
        self._names[entry.name] = _Name.STALE

    # Emptying

    def begin_emptying(self) -> str | None:
        """Return a name whose file is to be overwritten with an empty slot."""
        name = next((name for name, state in self._names.items() if state is _Name.STALE), None)
        if name is not None:
            self._names[name] = _Name.EMPTYING
        return name

    def emptied(self, name: str, *, ok: bool) -> None:
        """Note how that went."""
        self._names[name] = _Name.FREE if ok else _Name.STALE

    def check_integrity(self) -> None:
        """Assert the invariants."""
        assert len(self._entries) + len(self._names) == self._most, "a name was lost or made up"
        assert not self._entries.keys() & self._names.keys()
        assert self._borrowed.keys() == self._lenders.keys() and not self._borrowed.keys() & self._entries.keys()
        for name, entry in self._entries.items():
            assert entry.name == name and entry.readers >= 0, entry
            assert not (entry.dropped and entry.still), entry
            assert entry.ready or not entry.readers, entry


MOST_NAME_CHARS = 64
"""Of a backend's name in a file's: file systems end a name at 255 bytes."""


def instance_of(backend: str, url: str) -> str:
    """Return what a backend's names begin with: the same after a restart of ours, so that files are used again.

    Only letters and digits of ASCII get into a file's name, which an engine on another machine is to take. A name
    that is long, or in other letters, is made unique by a checksum.
    """
    plain = "".join(each if each.isascii() and each.isalnum() else "_" for each in backend)[:MOST_NAME_CHARS]
    checksum = "" if backend.isascii() and len(backend) <= MOST_NAME_CHARS else f"-{_sum(backend)}"
    return f"{plain}{checksum}-{_sum(url)}"


def _sum(text: str) -> str:
    return f"{crc32(text.encode(errors='surrogatepass')):08x}"


def covered(prefix: Sequence[int], tokens: int, prompt: Sequence[int]) -> float:
    """Return about how many of *tokens*, what a prompt *prefix* left, another prompt would find."""
    shared = in_common(prefix, prompt)
    return tokens * shared / len(prefix) if shared else 0.0
