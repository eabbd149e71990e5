"""Why a waiting call cannot go, and how long such a wait may be: shared by both kinds of cache."""

from __future__ import annotations

from enum import StrEnum

PATIENCE_S = 30.0
"""A wait beyond this, in seconds, is too long, under every policy: a call that waited so long is passed no more by
others that fit the cache (``prefix.admission``), the place of a workflow whose tool runs so long may be taken
(``prefix.references``), and a busy slot is waited for no longer (``slots.fanout``)."""


GATE_TOKENS = 192.0
"""A prefix of so many tokens that another call is just prefilling is worth waiting for."""


class Held(StrEnum):
    """Why a waiting call cannot go."""

    CACHE = "cache"
    """What it needs does not fit beside what others count on."""
    PREFIX = "prefix"
    """Another call is prefilling what both begin with."""
