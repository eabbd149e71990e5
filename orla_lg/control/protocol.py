"""The control protocol: a line of JSON for each request, and a line or more for its answer.

====================================================================  ========================================
``{"do": "state"}``                                                   ``{"ok": true, "state": {…}}``
``{"do": "watch", "interval_s": 1}``                                  the same again and again, until one hangs up
``{"do": "pause", "backend": "heavy"}``                               ``{"ok": true}``; likewise ``resume``
``{"do": "drain", "backend": "heavy", "timeout_s": 30}``              ``{"ok": true, "drained": true}``, later
``{"do": "policy", "stage_policy": "edf", "request_policy": "sjf"}``  ``{"ok": true}``; on one ``backend``, or all
``{"do": "limit", "backend": "heavy", "max_concurrency": 8}``         ``{"ok": true}``; likewise ``capacity``
``{"do": "prioritize", "run": "thread-7", "priority": 8}``            ``{"ok": true}``; of a ``tenant`` if named
``{"do": "move", "workflow": "thread-7", "backend": "heavy"}``        ``{"ok": true}``; likewise
====================================================================  ========================================

What cannot be done is answered with ``{"ok": false, "error": "…"}``, changes nothing, and the next line is read.
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, TypeAdapter, ValidationError

from orla_lg.control.state import ProcessState
from orla_lg.core.boundary.plain import shown_within
from orla_lg.errors import ConfigError

MAX_LINE_BYTES = 64 * 1024
"""A request may be so long. Answers are longer: a state names up to a hundred calls for each backend."""

MIN_INTERVAL_S = 0.1


class _Request(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Look(_Request):
    """Ask for the state."""

    do: Literal["state"] = "state"


class Watch(_Request):
    """Ask for the state every ``interval_s`` seconds."""

    do: Literal["watch"] = "watch"
    interval_s: float = Field(1.0, ge=MIN_INTERVAL_S, le=3600)


class Pause(_Request):
    """Grant nothing more on a backend."""

    do: Literal["pause"] = "pause"
    backend: str


class Resume(_Request):
    """Let calls go there again."""

    do: Literal["resume"] = "resume"
    backend: str


class Drain(_Request):
    """Pause, and answer when nothing is in flight there, or ``timeout_s`` seconds have passed."""

    do: Literal["drain"] = "drain"
    backend: str
    timeout_s: float | None = Field(None, ge=0)


class Policy(_Request):
    """Order by other policies; named ones only, since an object does not go through a socket."""

    do: Literal["policy"] = "policy"
    stage_policy: str | dict[str, str] | None = None
    request_policy: str | dict[str, str] | None = None
    backend: str | None = None


class SetLimit(_Request):
    """Set other limits; a limit that is left out stays as it is."""

    do: Literal["limit"] = "limit"
    backend: str
    max_concurrency: PositiveInt | None = None
    """``null``: as the engine bounds it."""
    capacity: NonNegativeInt = 0


class Prioritize(_Request):
    """Give the calls of a run, or of a thread's open runs, another priority: those that wait, and those to come."""

    do: Literal["prioritize"] = "prioritize"
    run: str
    """A run, or a thread."""
    priority: float
    tenant: str | None = None


class MoveWorkflow(_Request):
    """Have the next calls of a workflow go to a backend, and its cache with them."""

    do: Literal["move"] = "move"
    workflow: str
    """A thread, a run, or a session of the gateway."""
    backend: str | None
    """``null``: where the mapping says, again."""
    tenant: str | None = None


Request = Look | Watch | Pause | Resume | Drain | Policy | SetLimit | Prioritize | MoveWorkflow

_REQUEST: TypeAdapter[Request] = TypeAdapter(Annotated[Request, Field(discriminator="do")])


class CoreRole(BaseModel):
    """Which of the servers of a pool answers."""

    pool: str
    epoch: int
    """Of its lease, which grows with each core that follows another one; 0: it has not decided yet."""
    cores: list[str]
    """URLs of the pool's core, and then of its standbys."""


class ControlReply(BaseModel):
    """What comes back."""

    ok: bool
    error: str | None = None
    drained: bool | None = None
    state: ProcessState | None = None
    core: CoreRole | None = None
    """Of a server."""


def parse(line: bytes) -> Request:
    """Read a request.

    Raises:
        ConfigError: It is none; saying what was wrong in it.
    """
    try:
        return _REQUEST.validate_json(line)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in fault["loc"])
        raise ConfigError(f"no such request: {where + ': ' if where else ''}{fault['msg']}") from None


def encode(message: Request | ControlReply) -> bytes:
    """Return a request or an answer as a line; what was not set is left out.

    What others named (threads, stages) is shown as in any terminal: JSON's readers refuse half a surrogate pair, and
    an id of a megabyte would be sent a hundred times a second.
    """
    line = shown_within(message.model_dump(exclude_unset=True))
    if not isinstance(message, ControlReply):
        line["do"] = message.do
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"
