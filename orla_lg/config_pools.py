"""``[pools]`` of ``orla.toml``: which backends share a core. Each is in exactly one pool, and each pool has its core.

One file is for all cores. The core of a pool is built from what the file says with the pool's backends alone; its
mapping may name those of the other pools, which are known here and decided about there.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from orla_lg.config_tables import ConfigFile
from orla_lg.core.boundary.checked import dotted
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.mapping import Mapper, foretold, parts_of
from orla_lg.errors import did_you_mean, shown
from orla_lg.mappers.load import LoadAware
from orla_lg.mappers.table import tables_of

POOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,100}")

Pools = Mapping[str, Sequence[str]]


def faults_of_pools(pools: Pools, backends: Iterable[str]) -> list[str]:
    """Return what is wrong with pools: a name, a backend that is none, or that is in no pool or in two."""
    if not pools:
        return []
    known, faults, seen = list(backends), list[str](), dict[str, str]()
    for pool, names in pools.items():
        where = dotted("pools", pool)
        if POOL_NAME.fullmatch(pool) is None:
            right = "letters, digits, and _ . - between them, 100 at most"
            faults.append(f"{where}: {shown(pool)} cannot be the name of a pool; it has {right}")
        if not names:
            faults.append(f"{where}: it has no backend")
        for name in names:
            if name not in known:
                faults.append(f"{where}: backend {shown(name)} does not exist{did_you_mean(name, known)}")
            elif name in seen:
                also = (
                    f"twice in {where}" if seen[name] == pool else f"in {dotted('pools', seen[name])} and in {where}"
                )
                faults.append(f"pools: backend {shown(name)} is {also}; one core decides about it")
            seen.setdefault(name, pool)
    left = [name for name in known if name not in seen]
    if left:
        faults.append(f"pools: {', '.join(map(shown, left))} in none of them; each backend is in exactly one pool")
    return faults


def pool_in(faults: list[str], table: ConfigFile, pool: str | None) -> str:
    """Return the pool that a core is built for; empty: it has all backends. Note what is wrong with the choice."""
    if pool is None or not table.pools:
        return ""
    pool = pool or (table.serve.pool if table.serve is not None else "")
    if not pool:
        names = ", ".join(table.pools)
        faults.append(f"pools: the file has {names}; say which one this core decides for: --pool, or [serve] pool")
    elif pool not in table.pools:
        faults.append(f"pools: there is no pool {shown(pool)}{did_you_mean(pool, table.pools)}")
    else:
        return pool
    return ""


def moved_backends(before: Pools, after: Pools) -> list[str]:
    """Return backends that are in another pool than before; calls of both cores would be at their engines at once."""
    pool_of = {name: pool for pool, names in before.items() for name in names}
    return [
        f"pools: backend {shown(name)} moves from {pool_of[name]} to {pool}; stop both cores for that"
        for pool, names in after.items()
        for name in names
        if pool_of.get(name, pool) != pool
    ]


def free_choices(pools: Pools, mappings: Mapping[str, Mapper | None]) -> Iterator[str]:
    """Yield what is to be said of mappings that choose freely among backends of several pools.

    Args:
        pools: With their backends.
        mappings: By how messages name them.
    """
    pool_of = {name: pool for pool, names in pools.items() for name in names}
    for where, mapper in mappings.items():
        for part in parts_of(mapper):
            for among in _choices(part):
                chosen = sorted({pool_of[name] for name in among if name in pool_of} if among else pools)
                if len(chosen) > 1:
                    yield (
                        f"pools: {where} chooses freely among backends of {' and '.join(chosen)} "
                        f"({type(part).__name__}): a core sees those of another pool by views that are up to 100 ms "
                        "old, and nothing of what lies in their caches"
                    )
                    break


def _choices(part: Mapper) -> Iterator[Sequence[str]]:
    """Yield the backends among which a mapper chooses by what it sees; none: any."""
    if isinstance(part, LoadAware):
        yield from (rule.to for table in tables_of(part) for rule in table.rules.values() if len(rule.to) > 1)
    elif not any(hasattr(part, name) for name in ("rules", "mappers", "inner")):
        said = foretold(part, ANY_STAGE)
        if said is not None and (said.open or len(said.backends) > 1):
            yield said.backends
