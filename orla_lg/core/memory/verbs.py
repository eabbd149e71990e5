"""What each verb of a memory policy means: how strong it is, what it ends, what an engine is asked for it.

All code that treats verbs differently asks this table. A new verb gets an entry here, or nothing can be imported.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from orla_lg.core.boundary.complete import complete
from orla_lg.core.engine.backend import Capability, Effect
from orla_lg.core.engine.capabilities import KVControl, WorkflowCache
from orla_lg.core.memory.events import CacheAction, Verb


@dataclass(frozen=True, slots=True)
class EngineOrder:
    """One thing that an engine may be asked to do with a workflow's cache."""

    needs: Capability
    """What the engine must be able to."""
    ask: Callable[[KVControl, WorkflowCache, CacheAction], Awaitable[Effect]]
    """Asks it."""


_PIN = EngineOrder(Capability.PIN, lambda control, cache, action: control.pin(cache, ttl_s=action.ttl_s))
_RELEASE = EngineOrder(Capability.RELEASE, lambda control, cache, action: control.release(cache))
_FLUSH = EngineOrder(Capability.FLUSH_WORKFLOW, lambda control, cache, action: control.flush(cache))


@dataclass(frozen=True, slots=True)
class VerbMeaning:
    """What a verb means wherever verbs are told apart."""

    strength: int
    """Of two verbs for the same cache the stronger one counts."""
    of_policies: bool = True
    """Whether a memory policy may ask for it; else it is our own order."""
    orders: tuple[EngineOrder, ...] = ()
    """What an engine with a prefix tree is asked: the first that it is able to; none: it has nothing of the kind."""
    releases: bool = False
    """The workflow's references to what is cached end, and so does a prefetch for it."""
    forgets: bool = False
    """The workflow's last prompt is not needed again: it is kept for no prefetch."""
    repeats: bool = False
    """It is asked again although nothing happened since the last time: it holds from then on."""


VERBS: Mapping[Verb, VerbMeaning] = complete(
    Verb,
    {
        Verb.WARM: VerbMeaning(0),
        Verb.PIN: VerbMeaning(1, orders=(_PIN,), repeats=True),
        Verb.RELEASE: VerbMeaning(2, orders=(_RELEASE,), releases=True),
        Verb.FLUSH: VerbMeaning(3, orders=(_FLUSH, _RELEASE), releases=True, forgets=True),
        Verb.SAVE: VerbMeaning(4, of_policies=False),
        Verb.RESTORE: VerbMeaning(5, of_policies=False),
    },
    "VERBS in orla_lg.core.memory.verbs",
)
"""By verb. A flush is asked as a release of an engine that cannot forget one workflow. How a warm-up is carried out
is in ``core.prefetch``, what engines with slots do in ``core.cache.slots``."""
