"""Moments as the APIs write them."""

from __future__ import annotations

from datetime import UTC, datetime


def rfc3339(moment_s: float) -> str:
    """Return a moment, in seconds since 1970, as RFC 3339 writes it."""
    return datetime.fromtimestamp(moment_s, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
