"""Who a call is to access policies: the tags of its key, and those that its caller claims beside them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from orla_lg.core.boundary.checked import text
from orla_lg.core.guard.policies import NO_TAGS
from orla_lg.errors import ConfigError, shown

NOTHING: Mapping[str, str] = {}


def checked_tags(where: str, tags: object) -> dict[str, str]:
    """Return tags as a dict of texts; anything else is a ``ConfigError``."""
    if not isinstance(tags, Mapping):
        raise ConfigError(f"{where} must be a table of names and texts, as {{'team': 'red'}}, got {shown(tags)}")
    for key, value in tags.items():
        text(f"{where}: a tag's name", key)
        text(f"{where}: tag {shown(key)}", value, empty=True)
    return dict(tags)


@dataclass(frozen=True, slots=True)
class AccessSubject:
    """The tags of a call, as ``key:value``."""

    sets: tuple[frozenset[str], ...] = (NO_TAGS,)
    """Policies must allow a call for each of these: the tags of its key (``NO_TAGS`` where it has none), and, where
    its caller claims further ones, all of them."""

    @classmethod
    def of(
        cls, tags: Mapping[str, str], claimed: Mapping[str, str] = NOTHING, *, trusted: bool = False
    ) -> AccessSubject:
        """Return the subject with these tags.

        Args:
            tags: Of its key, or of its ``Orla``.
            claimed: By the caller; they can only narrow what the key's tags allow.
            trusted: Claimed tags count as the key's: there are no keys, and the caller is on this machine.
        """
        if not (tags or claimed):
            return NO_SUBJECT
        mine = frozenset(f"{key}:{value}" for key, value in tags.items())
        both = mine | {f"{key}:{value}" for key, value in claimed.items()}
        if trusted or both == mine:
            return cls((both,))
        return cls((mine or NO_TAGS, both))


NO_SUBJECT = AccessSubject()
