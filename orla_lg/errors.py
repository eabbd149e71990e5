"""Every error that orla_lg raises, under one root.

OrlaError
├── ConfigError            a configuration is wrong: file, key, what was found, what is allowed
│   └── ArgumentError      an argument that is not there, or one too few
├── MappingError           a stage cannot run where it was mapped
├── PolicyError            a policy of a user's own failed at a call
├── WorkflowError          a ``Workflow`` cannot run as its stages and dependencies are
├── StageError             a stage's builder, tools or answer are not what they should be
├── OrlaClosed             a call arrived after ``Orla.close()``
├── EngineError            an embedded engine or its model could not be had
├── CallRefused            a call was not sent to an engine
│   ├── QueueFull          the backend's queue is at capacity
│   ├── DeadlineExceeded   the call's deadline passed while it waited
│   ├── BudgetExceeded     a limit on calls, tokens, cost or time is spent
│   └── AccessDenied       an access policy denies it where it goes, or what it carries
├── BackendUnavailable     no attempt reached an engine that answered
├── EngineRefused          an engine refused what we asked of our own accord (a warm-up, a raw stream)
├── ThreadBusy             another run owns the thread
│   └── ThreadLost         the thread was this run's, and another run has taken it over
└── RecordUnknown          a score was given for a record that is not there

Each message says what was wrong, where, and what would be right. What the engine itself answers (HTTP
400, 429 …) to a caller's own request is not ours: the caller gets the OpenAI SDK's own exception, as without orla_lg.
"""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable

__all__ = [
    "AccessDenied",
    "ArgumentError",
    "BackendUnavailable",
    "BudgetExceeded",
    "CallRefused",
    "ConfigError",
    "DeadlineExceeded",
    "EngineError",
    "EngineRefused",
    "MappingError",
    "OrlaClosed",
    "OrlaError",
    "PolicyError",
    "QueueFull",
    "RecordUnknown",
    "StageError",
    "ThreadBusy",
    "ThreadLost",
    "WorkflowError",
    "did_you_mean",
    "shown",
]


class OrlaError(Exception):
    """The root: catch this to catch everything orla_lg raises."""


class ConfigError(OrlaError, ValueError):
    """A configuration is wrong; the message names the place, what was found and what is allowed."""


class ArgumentError(ConfigError, TypeError):
    """A public class or method has no argument of that name, or lacks one; the message names the nearest.

    A ``TypeError`` too, as Python's own answer is.
    """


class MappingError(OrlaError, ValueError):
    """A stage cannot run where it was mapped; the message names stage, backend and choices."""


class PolicyError(OrlaError, RuntimeError):
    """A request policy of a user's own failed at a call; the message names the policy, the call and what it raised.

    The call was not queued. A ``RuntimeError`` too, so that LangGraph's default retry policy does not try again.
    """


class WorkflowError(OrlaError, ValueError):
    """A ``Workflow`` cannot run: a cycle, an unknown stage, a stage without a prompt; all faults at once."""


class StageError(OrlaError):
    """A stage of a ``Workflow`` failed by what its builder, its tools or its model gave; the message names it.

    What an engine, a tool or a builder raises stays what it is; a note names the stage.
    """


class OrlaClosed(OrlaError, RuntimeError):
    """A call arrived after its ``Orla`` was closed."""


class EngineError(OrlaError, RuntimeError):
    """An embedded engine could not be started, or its model could not be fetched."""


class CallRefused(OrlaError):
    """A call was refused before it reached an engine; nothing was sent."""


class QueueFull(CallRefused):
    """The backend's queue holds as many waiting calls as its capacity allows."""


class DeadlineExceeded(CallRefused, TimeoutError):
    """The call's ``deadline_s`` passed before an engine began to work on it."""


class BudgetExceeded(CallRefused, RuntimeError):
    """A limit on calls, tokens, cost or wall time is spent; the message says which.

    A ``RuntimeError`` too, so that LangGraph's default retry policy does not try again what cannot go well.

    Args:
        message: Which limit, whose, how much is spent, and what would be right.
        scope: ``run``, ``stage``, ``tenant`` or ``key``.
        name: The run's id, the stage, the tenant, or the name of a server's key.
        figure: ``calls``, ``tokens``, ``cost_usd`` or ``wall_s``.
        retry_after_s: Seconds until its window leaves room; ``None`` if waiting alone does not help.
    """

    def __init__(
        self, message: str, *, scope: str = "", name: str = "", figure: str = "", retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.scope, self.name, self.figure, self.retry_after_s = scope, name, figure, retry_after_s


class AccessDenied(CallRefused, PermissionError):
    """An access policy denies a call the backend, a tool, a label or the skill; the message says which.

    A ``PermissionError`` too, so that LangGraph's default retry policy does not try again what cannot go well.

    Args:
        message: Who may not use what, and which policy says so.
        rule: The policy's name; empty where none could be asked.
    """

    def __init__(self, message: str, *, rule: str = "") -> None:
        super().__init__(message)
        self.rule = rule


class BackendUnavailable(OrlaError, ConnectionError):
    """No attempt reached an engine that answered.

    A ``ConnectionError`` too, so that LangGraph's default retry policy treats it as transient.
    """


class EngineRefused(OrlaError):
    """An engine answered one of our own requests with an error; the message has its status and words."""

    def __init__(self, message: str, *, status: int) -> None:
        super().__init__(message)
        self.status = status


class ThreadBusy(OrlaError, RuntimeError):
    """Another run owns the thread: nothing was read and nothing written.

    A ``RuntimeError`` too, so that LangGraph's default retry policy does not try again.

    Args:
        message: Which thread, whose it is, for how long, and what would be right.
        thread: Its id.
        host: Where the owner runs.
        pid: The owner's process.
        run: The owner's run.
        left_s: Seconds until the owner's lease ends, unless it renews.
    """

    def __init__(
        self, message: str, *, thread: str = "", host: str = "", pid: int = 0, run: str = "", left_s: float = 0.0
    ) -> None:
        super().__init__(message)
        self.thread, self.host, self.pid, self.run, self.left_s = thread, host, pid, run, left_s


class ThreadLost(ThreadBusy):
    """The thread was this run's, until its lease ran out and another run took it over; a late write was refused."""


class RecordUnknown(OrlaError, LookupError):
    """No record has this id, or it is no longer kept (``keep_records``)."""


NAME_CHARS = 200
"""So much of a name, or of a wrong value, stands in a message."""

_LISTED = 50
"""So many choices are listed, and compared with a name that is unknown."""


_CREDENTIALS = re.compile(r"//[^/@\s]*@")


class _Bounded(reprlib.Repr):
    """``repr`` in a bounded length and depth, whatever the value."""

    def __init__(self) -> None:
        super().__init__()
        self.maxstring = self.maxother = NAME_CHARS
        self.maxlevel = 3

    def repr_int(self, x: int, level: int) -> str:
        """Show a number; one too long for decimals by its length."""
        return repr(x) if x.bit_length() < NAME_CHARS else f"a number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """Return *value* as a message may show it: in bounded length, and a URL without its user and password."""
    return _CREDENTIALS.sub("//…@", _Bounded().repr(value))


def did_you_mean(name: object, choices: Iterable[object]) -> str:
    """Return ``"; did you mean 'x'? Known: …"``, for the end of a message about an unknown *name*."""
    known = sorted(map(_name, choices))
    near = difflib.get_close_matches(_name(name), known[:1000], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ";"
    more = "" if len(known) <= _LISTED else f" and {len(known) - _LISTED} more"
    return f"{hint} known: {', '.join(known[:_LISTED]) or 'none'}{more}"


def _name(name: object) -> str:
    return _CREDENTIALS.sub("//…@", name[:NAME_CHARS]) if isinstance(name, str) else shown(name)
