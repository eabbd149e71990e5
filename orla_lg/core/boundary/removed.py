"""Names of earlier versions that are no more: an error says so and why, not that the name is unknown."""

from __future__ import annotations

from collections.abc import Mapping

from orla_lg.errors import ConfigError

NO_EVENTS = (
    "what an engine's cache holds is followed by what calls found in it; its events made no call faster, and "
    "the core reads them no more"
)

REMOVED: Mapping[tuple[str, object], str] = {
    ("key", "kv_events"): NO_EVENTS,
    ("key", "kv_replay"): NO_EVENTS,
    ("policy", "critical_path"): (
        "it let long runs pass short ones, and inside a run its order gained nothing; "
        "'shortest_remaining' shortens the mean, 'workflow_fcfs' the slowest runs"
    ),
}
"""By what it was and its name, why it was removed (docs/decisions/what-pays.md has the figures)."""


def reason(kind: str, name: object) -> str | None:
    """Return that a name was removed, and why; ``None`` for any other name."""
    why = REMOVED.get((kind, name)) if isinstance(name, str) else None
    return None if why is None else f"{kind} {name!r} was removed: {why}"


def refuse(kind: str, name: object) -> None:
    """Do nothing unless a name was removed.

    Raises:
        ConfigError: It was; with the reason.
    """
    if (why := reason(kind, name)) is not None:
        raise ConfigError(why)
