"""``orla-lg`` with one of its parts spoilt: the controls, which must fail.

``python -m tests.scale_faults.spoilt PART serve ...``
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from orla_lg.cli import main
from orla_lg.serve.link import orphans
from orla_lg.serve.link.recovery import Recovery
from orla_lg.serve.link.roster import Listed
from orla_lg.serve.store.lease import CoreLease, FencedStore
from orla_lg.serve.store.scoped import ScopedStore

GRACE_S = 1.0

begin = Recovery.begin


def no_roster(self: Recovery, roster: Mapping[str, Listed], now: float, patience_s: float) -> None:
    begin(self, {}, now, patience_s)


def fixed_grace(self: Recovery, roster: Mapping[str, Listed], now: float, patience_s: float) -> None:
    begin(self, roster, now, GRACE_S)


def _spoil(owner: Any, **parts: Any) -> None:
    for name, part in parts.items():
        setattr(owner, name, part)


def spoil_lease() -> None:
    """Let a core never learn that another one followed it: neither by its lease nor by what it writes."""
    _spoil(CoreLease, holds=lambda self: True, renew=lambda self: False)
    _spoil(FencedStore, put=ScopedStore.put)


def spoil_grace() -> None:
    """Let a core wait for replicas so long and no longer, and keep nothing back for those that said nothing."""
    _spoil(Recovery, begin=fixed_grace)
    _spoil(orphans.Orphans, silent=lambda self, listed, now: None)


def spoil_memory() -> None:
    """Let a core never notice that a Redis has forgotten what stood in it."""
    from orla_lg.serve.store.redis import RedisStore  # its client may not be installed

    _spoil(RedisStore, _check_born=lambda self, born, raises=True: None)


PARTS: Mapping[str, Callable[[], None]] = {
    "roster": partial(_spoil, Recovery, begin=no_roster),
    "grace": spoil_grace,
    "lease": spoil_lease,
    "memory": spoil_memory,
    "hang-ups": partial(_spoil, orphans, SILENT_LETS_GO_S=0.0, TELLING_LETS_GO_S=0.0),
}

if __name__ == "__main__":
    PARTS[sys.argv.pop(1)]()
    sys.exit(main())
