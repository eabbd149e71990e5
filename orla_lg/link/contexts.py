"""What this replica's calls left in the slots of engines, for a core that has seen none of them.

Where an engine keeps its cache in numbered slots (llama.cpp), the core says which slot a call gets. One that took
over does not know whose context is where, and would prefill each workflow's anew in a slot of another one. An engine
that finds prefixes by itself needs nothing of this.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Iterator

from orla_lg.link.call import LinkedCall
from orla_lg.link.messages import End, Enter, SlotContents

MOST_SLOTS = 256
"""Of all engines together; the contents of those used longest ago are forgotten."""


class LeftContexts:
    """The last call in each slot. Under the link's lock."""

    def __init__(self) -> None:
        self._calls: OrderedDict[tuple[str, int], tuple[Enter, int, float, int]] = OrderedDict()
        """By backend and slot: what was said of it, its tokens, when it ended (monotonic), its core's epoch."""

    def ended(self, call: LinkedCall, end: End) -> None:
        """Note a call that ended; only what was in a slot is kept."""
        grant = call.grant
        if grant is None or grant.slot is None or grant.backend is None or grant.cache_action is None:
            return
        at = (grant.backend, grant.slot)
        self._calls.pop(at, None)
        if end.error is None and end.prompt_tokens:
            tokens = end.prompt_tokens + end.completion_tokens
            self._calls[at] = (call.entering(), tokens, time.monotonic(), grant.epoch)
            if len(self._calls) > MOST_SLOTS:
                self._calls.popitem(last=False)

    def again(self, epoch: int) -> Iterator[SlotContents]:
        """Yield what a core of *epoch* did not see."""
        now = time.monotonic()
        for (backend, slot), (enter, tokens, ended_s, seen) in self._calls.items():
            if seen != epoch:
                yield SlotContents(tuple(enter), backend, slot, tokens, now - ended_s)

    def forked(self) -> None:
        """Forget the parent's calls, in a child."""
        self._calls.clear()
