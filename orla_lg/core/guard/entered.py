"""What one workflow, or one run, entered: stages with labels; and which workflows are forgotten."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from orla_lg.core.guard.flow import NONE
from orla_lg.core.guard.policies import ANY_LABEL
from orla_lg.core.identity import NAMESPACE_SEPARATOR
from orla_lg.core.workflow import Outcome, RunState

MOST_ENTRIES = 256
"""Of one workflow: stages with labels that it entered. Beyond that it carries any label."""

MOST_KEPT = 256
"""Labels of one of these: its own, and those that callers claim in it."""

FORGOTTEN_BITS = 1 << 20

Place = tuple[str, str]
"""A graph's name, and a stage in it; an empty stage leads everywhere."""

EVERYWHERE = ("", "")

ANY = frozenset({ANY_LABEL})


def joined(known: frozenset[str], labels: frozenset[str]) -> frozenset[str]:
    """Return all of these labels; of more than are kept for one stage, any."""
    if labels <= known or ANY_LABEL in known:
        return known
    both = known | labels
    return both if len(both) <= MOST_KEPT and ANY_LABEL not in both else ANY


class ForgottenNames:
    """Names, remembered in bounded memory: every one that was added is found, and some others too."""

    def __init__(self, bits: bytes | None = None) -> None:
        size = FORGOTTEN_BITS // 8
        kept = bytes(size) if bits is None else bits
        self.bits = bytearray(kept if len(kept) == size else b"\xff" * size)  # of another size: any name may be in it
        self.any = any(self.bits)

    def add(self, name: str) -> None:
        """Remember a name."""
        self.any = True
        for place in _places(name):
            self.bits[place >> 3] |= 1 << (place & 7)

    def __contains__(self, name: str) -> bool:
        return self.any and all(self.bits[place >> 3] & 1 << (place & 7) for place in _places(name))


def _places(name: str) -> list[int]:
    hashed = blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return [int.from_bytes(hashed[at : at + 4]) % FORGOTTEN_BITS for at in range(0, 16, 4)]


@dataclass(eq=False, slots=True)
class WorkflowLabels:
    """What one workflow entered."""

    entered: dict[Place, frozenset[str]] = field(default_factory=dict)
    loose: frozenset[str] = NONE
    """Labels of runs that did not come to their end: the workflow's state may hold them wherever the next one
    begins."""
    open: dict[str, frozenset[str]] = field(default_factory=dict)
    """Labels that runs brought in which are open now."""

    def add(self, place: Place, labels: frozenset[str]) -> bool:
        """Note that a stage with labels was entered; returns whether that is new."""
        if place not in self.entered and len(self.entered) >= MOST_ENTRIES:
            place, labels = EVERYWHERE, ANY
        known = self.entered.get(place, NONE)
        if (both := joined(known, labels)) == known:
            return False
        self.entered[place] = both
        return True

    @property
    def all(self) -> frozenset[str]:
        """All labels that it ever entered a stage of."""
        return self.loose.union(*self.entered.values())

    def dumped(self) -> bytes:
        """Return it as bytes; runs that are open count as if they did not come to their end."""
        loose = self.loose.union(*self.open.values())
        entered = [[graph, stage, sorted(labels)] for (graph, stage), labels in self.entered.items()]
        return json.dumps({"entered": entered, "loose": sorted(loose)}).encode()

    @classmethod
    def read(cls, value: bytes) -> WorkflowLabels:
        """Return what ``dumped`` made.

        Raises:
            ValueError, TypeError, KeyError: It is none.
        """
        said: Any = json.loads(value)
        entered = {(str(graph), str(stage)): frozenset(map(str, labels)) for graph, stage, labels in said["entered"]}
        return cls(entered, frozenset(map(str, said["loose"])))


@dataclass(eq=False, slots=True)
class RunLabels:
    """What one open run entered."""

    entered: dict[Place, frozenset[str]] = field(default_factory=dict)
    declassified: dict[str, frozenset[str]] = field(default_factory=dict)
    """By stage that it entered, what that took off; without what was brought in again later."""
    workflows: set[str] = field(default_factory=set)
    """Those that it was in."""
    told: set[str] = field(default_factory=set)
    """Of these, those that know all of it."""


def close(state: WorkflowLabels, run: RunState, known: RunLabels, outcome: Outcome) -> None:
    """Note what an ended run leaves in its workflow's state."""
    brought = state.open.pop(run.id, NONE)
    if outcome is Outcome.DONE:
        state.loose = state.loose.difference(*known.declassified.values())
        return
    under_way = set(run.trace.path().latest)  # one of these failed or was interrupted, and may run again
    ended = [
        off for stage, off in known.declassified.items() if stage.partition(NAMESPACE_SEPARATOR)[0] not in under_way
    ]
    state.loose |= brought.difference(*ended)
