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


class NotBegun(StrEnum):
    """Why a tool that an answer asks for did not begin before its turn; ``Late`` has why of its whole answer."""

    NOT_DECLARED = "not_declared"
    UNSEEN = "unseen"
    """It is declared safe, and no node was seen yet to run a tool of that name."""
    APPROVED = "approved"
    """Its calls are approved first."""
    NEEDS_ITS_PLACE = "needs_its_place"
    """It is called with what is injected there, or asked for what is there only."""
    UNUSED = "unused"
    FAILING = "failing"
    """As ``LeftOut``."""
    SEVERAL = "several"
    """Several tools have its name, and which one is meant does not show."""
    ARGUMENTS = "arguments"
    """They are not valid."""
    NO_LOOP = "no_loop"
    """It is a coroutine only, and the model was not called in a loop."""
    NO_ROOM = "no_room"
    """So many run, or wait, that it found no thread."""
    UNHEARD = "unheard"
    """Its call was not heard before the answer ended."""


class LeftOut(StrEnum):
    """Why a tool is not started early any more."""

    NEEDS_ITS_PLACE = "needs_its_place"
    """It asked for what is there in its place only."""
    UNUSED = "unused"
    """No call asked for what its starts returned, though their runs went on."""
    FAILING = "failing"
    """Its starts raised, or could not be waited for, and it ran again in its place."""
