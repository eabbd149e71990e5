"""What was spent under limits, and what was learned, written behind to the store: the next core goes on with it.

An account is written within a second after something was booked in it; what a crash takes is the last second's. What
was promised to calls under way is not written: their replicas bring it again with them (``Adopt``).
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Hashable, Mapping
from typing import Any

from orla_lg.core.limits.limits import FIGURES
from orla_lg.core.limits.usage import NOTHING, SLICES, Amount, Key, Scope, UsageAccount, figures_of
from orla_lg.core.serving import Serving
from orla_lg.errors import ConfigError
from orla_lg.serve.store.store import Store, StoreUnavailable

log = logging.getLogger("orla_lg")

SPENT = "spent/"
ESTIMATES = "estimates"

EVERY_S = 1.0
ESTIMATES_EVERY_S = 60.0

MOST_RESTORED = 20_000
"""Accounts that are taken over from the core before, the newest first."""

FORGET_S = 30 * 86_400.0
"""An account of a run that was not touched for so long is dropped: the run ended while no core was there."""


class SpentKeeper:
    """Keeps what a core's limits have booked. Of the loop's thread.

    Args:
        serving: The core.
        store: Where it is kept.
        may_write: Whether this core still decides: one that was replaced must not overwrite what the next one wrote.
        wall: Seconds since the epoch.
    """

    def __init__(
        self,
        serving: Serving,
        store: Store,
        may_write: Callable[[], bool],
        *,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._serving = serving
        self._store = store
        self._may_write = may_write
        self._wall = wall
        self._written: dict[str, Amount | None] = {}
        """By the store's key, what was spent when it was last written; ``None``: it is to be written again."""
        self._due_s = self._estimates_due_s = 0.0
        self._writing: asyncio.Future[None] | None = None
        self._complained = False

    def load(self) -> None:
        """Take over what the core before has left.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        serving, now, wall_s = self._serving, self._serving.clock(), self._wall()
        self._estimates_due_s = now + ESTIMATES_EVERY_S
        entries = self._store.scan(SPENT)
        newest = sorted(entries.items(), key=lambda entry: entry[1].version)[-MOST_RESTORED:]
        for name, entry in newest:
            read = _read(name.removeprefix(SPENT), entry.value, now, wall_s)
            if read is None:
                self._store.put(name, None)
            else:
                serving.limits.brought[read[0]] = read[1]
                self._written[name] = read[1].spent
        if (kept := self._store.get(ESTIMATES)) is not None:
            try:
                serving.estimates.restore(kept.value, "the store's estimates")
            except ConfigError as error:
                log.warning("%s; this core begins with nothing learned", error)

    def look(self, now: float) -> None:
        """Write what is due; called with each tick."""
        if now < self._due_s or (self._writing is not None and not self._writing.done()) or not self._may_write():
            return
        self._due_s = now + EVERY_S
        changes = self._changes(now)
        if not changes and now < self._estimates_due_s:
            return
        learned = now >= self._estimates_due_s
        if learned:
            self._estimates_due_s = now + ESTIMATES_EVERY_S
        self._writing = asyncio.get_running_loop().run_in_executor(None, self._write, changes, learned)

    def close(self) -> None:
        """Write the rest, here and now."""
        if self._may_write():
            self._write(self._changes(self._serving.clock()), True)

    def _changes(self, now: float) -> dict[str, bytes | None]:
        """Return what is to be written, and what is to be deleted (``None``): accounts of runs that are over."""
        serving, changes = self._serving, dict[str, bytes | None]()
        runs = serving.book.runs()
        open_runs = {run.id for run in runs}
        for run, key, account in serving.limits.spent(runs):
            name = _name(run, key)
            if name is None or self._written.get(name) == account.spent:
                continue
            self._written[name] = account.spent
            changes[name] = _text(account, now, self._wall()).encode()
        waits = {run for run, _ in serving.limits.brought}
        for name in [name for name in self._written if name not in changes]:
            run = _run(name)
            if run and run not in open_runs and run not in waits:
                del self._written[name]
                changes[name] = None
        return changes

    def _write(self, changes: Mapping[str, bytes | None], learned: bool) -> None:
        """Write changes; in a thread, as a disk may be slow."""
        try:
            for name, value in changes.items():
                self._store.put(name, value)
            if learned:
                self._store.put(ESTIMATES, self._serving.estimates.dumped())
            self._complained = False
        except StoreUnavailable as error:
            self._written.update(dict.fromkeys(changes))  # tried again: what is over is to be deleted all the same
            if not self._complained:
                self._complained = True
                log.warning("what is spent cannot be kept: %s", error)


def spent_under(store: Store, key: Key, wall_s: float) -> UsageAccount | None:
    """Return an account as the store keeps it, by the wall clock; ``None`` where nothing was spent."""
    name = _name("", key)
    value = None if name is None else store.get(name)
    read = None if value is None or name is None else _read(name.removeprefix(SPENT), value.value, wall_s, wall_s)
    return None if read is None else read[1]


def _name(run: str, key: Key) -> str | None:
    name = account_name(run, key)
    return None if name is None else SPENT + name


def account_name(run: str, key: Key) -> str | None:
    """Return the name of an account in the store; ``None`` for limits whose key means nothing in another process."""
    layer = _plain(key[0])
    return None if layer is None else json.dumps([run, layer, str(key[1]), key[2]])


def _plain(layer: Hashable) -> str | list[str] | None:
    if isinstance(layer, str):
        return layer
    if isinstance(layer, tuple) and all(isinstance(part, str) for part in layer):
        return list(layer)
    return None


def _run(name: str) -> str:
    run: str = json.loads(name.removeprefix(SPENT))[0]
    return run


def _text(account: UsageAccount, now: float, wall_s: float) -> str:
    slices = [[round(wall_s - (now - begun_s), 3), _amount(amount)] for begun_s, amount in account.slices]
    return json.dumps(
        {"at": round(wall_s, 3), "per_s": account.per_s, "spent": _amount(account.spent), "slices": slices}
    )


def _amount(amount: Amount) -> list[float]:
    return list(figures_of(amount))


def _read(name: str, value: bytes, now: float, wall_s: float) -> tuple[tuple[str, Key], UsageAccount] | None:
    """Return an account; ``None`` for one that is not to be taken over: it is empty by now, or cannot be read."""
    try:
        run, layer, scope, of = json.loads(name)
        entry = json.loads(value)
        per_s = None if entry["per_s"] is None else float(entry["per_s"])
        account = UsageAccount(spent=_read_amount(entry["spent"]), per_s=per_s)
        slices = [
            (now - max(0.0, wall_s - float(begun_s)), _read_amount(amount)) for begun_s, amount in entry["slices"]
        ]
        key: Key = (tuple(layer) if isinstance(layer, list) else layer, Scope(scope), of)
        age_s = wall_s - float(entry["at"])
    except (ValueError, TypeError, KeyError) as error:
        log.warning("what was spent under %s cannot be read (%s); it counts from nothing", name[:200], error)
        return None
    if per_s is not None:
        slices = [each for each in slices if now < each[0] + per_s * (1 + 1 / SLICES)]
        account.slices, account.spent = deque(slices), NOTHING
        for _, amount in slices:
            account.spent = account.spent.plus(amount)
    over = (run and age_s > FORGET_S) or account.spent == NOTHING
    return None if over else ((run, key), account)


def _read_amount(figures: Any) -> Amount:
    kinds: list[Any] = [int if figure.whole else float for figure in FIGURES.values()]
    return Amount(*(kind(each) for kind, each in zip(kinds, figures, strict=True)))
