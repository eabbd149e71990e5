"""Why an early start is not handed over, and why a tool starts early no more."""

from __future__ import annotations

from enum import StrEnum


class DropReason(StrEnum):
    """Why a start was not handed over."""

    CHANGED = "changed"
    """The answer ended without the call."""
    NEXT_CALL = "next_call"
    """The same node made its next call, and the tool's turn had not come."""
    RUN_ENDED = "run_ended"
    """Finished, failed, cancelled, interrupted, or left by its reader."""
    NOT_BEGUN = "not_begun"
    """The tool's turn came before its body had begun."""
    CANCELLED = "cancelled"
    """The tool's turn came, and what waited for the result was cancelled."""
    TOO_MANY = "too_many"
    TOO_LONG = "too_long"
    CLOSED = "closed"


class LeftOut(StrEnum):
    """Why a tool is not started early any more."""

    NEEDS_ITS_PLACE = "needs_its_place"
    """It asked for what is there in its place only."""
    UNUSED = "unused"
    """No call asked for what its starts returned, though their runs went on."""
    FAILING = "failing"
    """Its starts raised, or could not be waited for, and it ran again in its place."""
