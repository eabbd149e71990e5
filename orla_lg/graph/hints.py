"""What is said around a call: its hints, and the limits that hold for it, of its run and of the nodes around it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from orla_lg.core.call import NO_HINTS, Hints
from orla_lg.core.guard.labels import LABEL_KEYS
from orla_lg.core.limits.limits import CONFIGURABLE, Limits, LimitScope
from orla_lg.core.workflow import RunState
from orla_lg.errors import ConfigError
from orla_lg.graph.context import CONFIG_KEY, LIMITS_KEY, Core, Origin
from orla_lg.graph.running_node import RunningNode


def hints_for(origin: Origin | None, core: Core, run: RunState | None) -> Hints:
    """Return the hints around a call, strongest first: prioritize, configurable, its node's, those of nodes around.

    Of each node the function's are stronger than its metadata; what one leaves open, the next one out says.
    """
    hints = NO_HINTS
    if run is not None and run.priority is not None:
        hints = Hints(priority=run.priority)
    if origin is None:
        return hints
    if said := origin.configurable.get(CONFIG_KEY):
        hints = hints.over(Hints.of(said, beside=(LIMITS_KEY,)))
    said, node = origin.metadata.get(CONFIG_KEY), origin.node
    if node is None:
        return hints.over(Hints.of(said, beside=LABEL_KEYS)) if said else hints
    if not said and node.told is NO_HINTS and node.outer is None:
        return hints
    if (gathered := node.gathered) is None or gathered[0]() is not core:
        gathered = node.gathered = (weakref.ref(core), *_gathered(node, core))
    hints = hints.over(gathered[1])
    if said and said != node.metadata.get(CONFIG_KEY):  # else it is the node's, and gathered
        hints = hints.over(Hints.of(said, beside=LABEL_KEYS))
    return hints.over(gathered[2])


def _gathered(node: RunningNode, core: Core) -> tuple[Hints, Hints]:
    """Return what the function says of a node, and what is weaker: its metadata, and all that nodes around it say."""
    own, around, views = NO_HINTS, NO_HINTS, list(node.outward())
    for view in views:
        handler = view.handler
        told = view.told if handler is not None and handler.orla_binding.core is core else NO_HINTS
        if view.chain == node.chain:  # another handler's view of the same node
            own = own.over(told)
        else:
            around = around.over(told)
        said = view.metadata.get(CONFIG_KEY)
        if said and not _is_inherited(said, view, views):
            around = around.over(Hints.of(said, beside=LABEL_KEYS))
    return own, around


def _is_inherited(said: Any, view: RunningNode, views: Sequence[RunningNode]) -> bool:
    """Whether a node's metadata has *said* from a node around it: what is inside a node inherits its metadata."""
    outer = views[views.index(view) + 1 :]
    return any(each.chain != view.chain and each.metadata.get(CONFIG_KEY) == said for each in outer)


def layers_for(origin: Origin | None, core: Core, run: RunState | None) -> tuple[LimitScope, ...]:
    """Return the limits around a call: of its run's graph, of the graph it is made in, and of its configuration.

    Raises:
        ConfigError: The limits in ``configurable`` are wrong, or the call is in no run that they could hold for.
    """
    if origin is None:
        return ()
    binding = origin.binding
    around = (
        None if run is None else run.layer,
        binding.layer if binding is not None and binding.core is core else None,
    )
    layers = () if around == (None, None) else tuple(dict.fromkeys(filter(None, around)))
    named = origin.configurable.get(CONFIG_KEY)
    said = named.get(LIMITS_KEY) if isinstance(named, Mapping) else None  # else Hints, which have none
    if said is None:
        return layers
    if run is None:
        raise ConfigError('limits in configurable["orla"] hold for one run of a wrapped graph; this call is in none')
    return (*layers, LimitScope(Limits.of(said), CONFIGURABLE, " in the run's configurable", of_run=True))
