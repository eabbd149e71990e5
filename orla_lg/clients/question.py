"""What a request asks of a model, and the wire in which each backend is asked it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from orla_lg.core.scheduler import BackendScheduler
from orla_lg.wires.chat import CHAT
from orla_lg.wires.completions import COMPLETIONS
from orla_lg.wires.embeddings import EMBEDDINGS
from orla_lg.wires.wire import Untranslatable, Wire

EVERYWHERE = frozenset({CHAT.name, COMPLETIONS.name, EMBEDDINGS.name})
"""Wires that carry the fields that are put into a request; an engine that does not say otherwise speaks these."""


@dataclass(eq=False)
class Question:
    """A request's body, and the wire that knows it."""

    wire: Wire
    """The caller's."""
    body: Mapping[str, Any]

    @property
    def middle(self) -> Wire:
        """The wire that an engine is asked in which does not speak the caller's."""
        return EMBEDDINGS if self.wire.embeds else CHAT

    @cached_property
    def translated(self) -> dict[str, Any]:
        """The request as one of the wire in the middle.

        Raises:
            Untranslatable: It cannot be said there.
        """
        return self.wire.to_chat(self.body)

    @cached_property
    def is_translatable(self) -> bool:
        """Whether it can be said in the wire in the middle."""
        try:
            return bool(self.translated)
        except Untranslatable:
            return False

    def wire_for(self, scheduler: BackendScheduler) -> Wire:
        """Return the wire in which a backend is asked: the caller's where the engine speaks it.

        A request that must carry what keeps workflows or tenants apart (a slot, a salt) goes in a wire that does.
        """
        wire, probe = self.wire, scheduler.health.probe
        if wire is CHAT:
            return wire
        if not self.is_spoken_by(scheduler):
            return self.middle
        is_kept_apart = scheduler.isolation.on or (probe is not None and probe.slots)
        return self.middle if is_kept_apart and not (wire.embeds or wire.name in EVERYWHERE) else wire

    def is_spoken_by(self, scheduler: BackendScheduler) -> bool:
        """Whether a backend's engine speaks the caller's wire."""
        probe = scheduler.health.probe
        return self.wire.name in (EVERYWHERE if probe is None or not probe.wires else probe.wires)


class EssentialQuestion(Question):
    """One whose offers are left out where chat completions cannot say them; its caller can go nowhere else."""

    @cached_property
    def translated(self) -> dict[str, Any]:
        """The request as one of the wire in the middle.

        Raises:
            Untranslatable: What it asks for cannot be said there.
        """
        return self.wire.to_chat(self.wire.essentials(self.body))
