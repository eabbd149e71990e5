"""What a replica says of a call, in the core's terms, and what the core answers, flat.

The tables that both sides know are in ``link.views``; here is what only the core reads. A peer's figures are bounded,
and what has the wrong shape ends its connection.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import inf
from typing import Any, NoReturn, Protocol

from orla_lg.core.call import Ask, Assignment, Call, CallerTimeout, Hints, scoped
from orla_lg.core.identity import TENANT_MARK, Identity, workflow_key, workflow_name
from orla_lg.core.mapping import Planned
from orla_lg.core.placement.elsewhere import BackendElsewhere
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import AccessDenied, BudgetExceeded, EngineRefused, MappingError, shown
from orla_lg.link.framing import LinkBroken
from orla_lg.link.messages import Enter, Flat, FlatMessage, Moved, Refused
from orla_lg.link.views import flat_assignment, read_hints
from orla_lg.serve.access.keys import KeyScope, allows

MOST_ID_CHARS = 200
MOST_NAME_CHARS = 2_000
"""Of ids, and of names of stages, workflows and models."""

MOST_AGE_S = 7 * 86_400.0
MOST_TIMEOUT_S = 7 * 86_400.0
MOST_ATTEMPTS = 100
MOST_TOKENS = 10**9
MOST_CHARS = 2**40


class LinkCaller(Protocol):
    """What a key allows, as far as links need it (``access.Caller``)."""

    @property
    def key_id(self) -> str | None:
        """The key's id; ``None`` where none is needed."""
        ...

    @property
    def tenants(self) -> tuple[str, ...] | None:
        """The tenants that it may name; none: its calls are no tenant's; ``None``: any."""
        ...

    @property
    def tags(self) -> Mapping[str, str]:
        """What access policies know it by."""
        ...

    @property
    def backends(self) -> tuple[str, ...] | None:
        """The backends that it may use; ``None``: all."""
        ...

    @property
    def stages(self) -> tuple[str, ...] | None:
        """The stages that it may call from; ``None``: all."""
        ...

    @property
    def scopes(self) -> frozenset[KeyScope]:
        """What it is for."""
        ...


class SpokenKeys(Protocol):
    """The keys in whose names gateways make calls (``access.Access``)."""

    def told(self, sha256: str) -> Flat:
        """Return what a gateway must know of a key, and whether there are keys at all."""
        ...

    def caller_of(self, key_id: str) -> LinkCaller:
        """Return what a call in the name of a key may do.

        Raises:
            AccessDenied: The key does not hold, or not for calls.
        """
        ...


def speaks_for_others(caller: LinkCaller) -> None:
    """Check that a link may make calls in the names of other keys, and ask for them.

    Raises:
        AccessDenied: It may not.
    """
    if KeyScope.GATEWAY not in caller.scopes:
        raise AccessDenied(
            "this link's key makes no calls in the name of another one, as gateways do; "
            "`orla-lg keys create NAME --scope gateway` makes one that does"
        )


# The prompt, of which only lengths and hashes are here


class Unsent(Sequence[Any]):
    """Stands for the messages of a prompt that stays in its replica."""

    def _refuse(self) -> NoReturn:
        raise MappingError(
            "a mapper of the server reads a call's messages, and prompts stay in the replica that sends them; give "
            "such a mapper to wrap(..., mapper=...) there"
        )

    def __getitem__(self, index: Any) -> Any:
        """Refuse."""
        self._refuse()

    def __iter__(self) -> Iterator[Any]:
        """Refuse."""
        self._refuse()

    def __len__(self) -> int:
        """Refuse."""
        self._refuse()

    def __bool__(self) -> bool:
        """Refuse."""
        self._refuse()


UNSENT = Unsent()


@dataclass(frozen=True)
class FlatAsk(Ask):
    """What a call in a replica asks for: its prompt is known by hashes and lengths."""

    hashes: Sequence[int] = field(default=(), repr=False)
    chars: Sequence[int] = field(default=(), repr=False)
    answers: Sequence[int] = field(default=(), repr=False)
    text_chars: int = 0
    schema_chars: int = 0
    shows_images: bool = False

    @cached_property
    def prompt_chars(self) -> int:
        """The length of the prompt's text, as the replica says."""
        return self.text_chars

    @cached_property
    def tools_chars(self) -> int:
        """The length of the tools' schemas, as the replica says."""
        return self.schema_chars

    @cached_property
    def images(self) -> bool:
        """Whether the prompt shows images."""
        return self.shows_images

    @cached_property
    def pieces(self) -> tuple[tuple[int, int], ...]:
        """For each message its chained hash and its length."""
        return scoped(tuple(zip(self.hashes, self.chars, strict=True)), self.scope)

    def is_answer(self, index: int) -> bool:
        """Whether a message is what a model said."""
        return index in self.answers

    def first(self, messages: int) -> FlatAsk:
        """Return what the first *messages* messages ask for."""
        kept = self.chars[:messages]
        return replace(self, hashes=self.hashes[:messages], chars=kept, text_chars=sum(kept))

    def followed(self, messages: Sequence[FlatMessage]) -> FlatAsk:
        """Return what is asked for once *messages* follow on an answer to it."""
        hashes = [*self.hashes, *(message.hashed for message in messages)]
        chars = [*self.chars, *(message.chars for message in messages)]
        return replace(
            self, hashes=hashes, chars=chars, answers=[*self.answers, len(self.hashes)], text_chars=sum(chars)
        )


def bounded(value: float, most: float, least: float = 0.0) -> float:
    """Return a peer's number within its bounds; one that is none is the least."""
    return min(max(value, least), most) if value == value else least


def whole(value: int | None, most: int = MOST_TOKENS) -> int | None:
    """Return a peer's count within its bounds."""
    return None if value is None else min(max(value, 0), most)


def named(value: str | None, what: str, most: int = MOST_NAME_CHARS) -> None:
    """Check a peer's name.

    Raises:
        LinkBroken: It is too long.
    """
    if value is not None and len(value) > most:
        raise LinkBroken(f"{what} of {len(value)} characters, at most {most} are right")


def numbers(values: Sequence[Any], what: str, most: int) -> Sequence[int]:
    """Return a peer's list of numbers.

    Raises:
        LinkBroken: One of them is none, or out of bounds.
    """
    if values and (set(map(type, values)) != _WHOLE or min(values) < 0 or max(values) > most):
        raise LinkBroken(f"{what} holds what is no number from 0 to {most}")
    return values


_WHOLE = {int}


def ask_of(enter: Enter) -> FlatAsk:
    """Return what a call asks for.

    Raises:
        LinkBroken: Its figures cannot be right.
    """
    if len(enter.hashes) != len(enter.chars):
        raise LinkBroken(f"a prompt with {len(enter.hashes)} hashes and {len(enter.chars)} lengths")
    named(enter.model, "a model's name")
    return FlatAsk(
        enter.model, UNSENT, stream=enter.stream, json_schema=enter.json_schema, tools=enter.tools,
        max_tokens=whole(enter.max_tokens), embeds=enter.embeds,
        hashes=numbers(enter.hashes, "hashes", 2**64 - 1), chars=numbers(enter.chars, "chars", MOST_CHARS),
        answers=numbers(enter.answers, "answers", MOST_CHARS),
        text_chars=whole(enter.prompt_chars, MOST_CHARS) or 0, schema_chars=whole(enter.tools_chars, MOST_CHARS) or 0,
        shows_images=enter.images,
    )  # fmt: skip


def workflow_of(key: str) -> str:
    """Return a workflow's key without a tenant, whatever a peer sent as one.

    Raises:
        LinkBroken: It is neither a name nor a key.
    """
    named(key, "a workflow's name")
    if not key.startswith(TENANT_MARK):
        return key
    try:
        return workflow_key(workflow_name(key))
    except ValueError as error:
        raise LinkBroken(f"{shown(key)} is no workflow's key") from error


def identity_of(enter: Enter) -> Identity:
    """Return where a call comes from.

    Raises:
        LinkBroken: A name is too long.
    """
    named(enter.run, "a run's id", MOST_ID_CHARS)
    named(enter.stage, "a stage's name")
    named(enter.namespace, "a namespace")
    return Identity(
        workflow_of(enter.workflow),
        enter.run,
        enter.stage,
        enter.step,
        enter.namespace,
        enter.thread,
        enter.identified,
    )


def tenant_within(caller: LinkCaller, tenant: str | None) -> str | None:
    """Return the tenant of a call or run that names *tenant*, within what the key carries.

    Raises:
        MappingError: It is none of the key's, or the key carries several and none is named.
    """
    carried = caller.tenants
    if carried is None or (tenant and tenant in carried):
        return tenant
    if tenant:
        has = ", ".join(carried) or "none"
        right = f"`orla-lg keys create NAME --scope link --tenant {shown(tenant)}` makes one that carries it"
        raise MappingError(f"tenant {shown(tenant)} is none of this key's, which carries {has}; {right}")
    if len(carried) > 1:
        right = f"hints={{'tenant': {carried[0]!r}}}, for instance"
        raise MappingError(f"this key carries {len(carried)} tenants, and the call names none; give {right}")
    return carried[0] if carried else None


def hints_of(enter: Enter) -> tuple[Hints, Hints]:
    """Return the hints given with the call, and the others.

    Raises:
        ConfigError: A value is not allowed.
    """
    return read_hints(enter.said), read_hints(enter.hints)


class CallerTimedOut(Exception):
    """The caller's own client would have given up; its replica raises the client's error."""


def timeout_of(enter: Enter) -> CallerTimeout | None:
    """Return how long the caller's client waits."""
    seconds = enter.timeout_s
    if seconds is None or not 0 < seconds < inf:
        return None
    return CallerTimeout(min(seconds, MOST_TIMEOUT_S), CallerTimedOut)


# Where it goes


@dataclass(frozen=True, slots=True)
class OwnMapping:
    """Says what the mapper of the call's graph, in the replica, has said."""

    assignment: Assignment

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment:  # noqa: D102
        return self.assignment

    def foretell(self, stage: str) -> Planned:
        """Return where it goes."""
        return Planned(stage, (self.assignment.backend, *self.assignment.alternatives), self.assignment.mapper)


@dataclass(slots=True)
class Fitting:
    """Takes out of an assignment where the replica cannot send the call, or its key may not."""

    able: Sequence[str] | None
    allowed: Sequence[str] | None
    left: Assignment | None = None
    """What was left of it."""

    def __call__(self, assignment: Assignment) -> Assignment | None:
        """Return what is left of it; ``None`` where the replica can send the call to none of it.

        Raises:
            MappingError: The key may use none of it.
        """
        self.left = self._fitting(assignment)
        return self.left

    def _fitting(self, assignment: Assignment) -> Assignment | None:
        named = (assignment.backend, *assignment.alternatives)
        able = [name for name in named if self.able is None or name in self.able]
        if not able:
            return None
        allowed = [name for name in able if allows(self.allowed, name)]
        if not allowed:
            where = ", ".join(map(repr, able))
            raise MappingError(f"this key may not use backend {where}; it may use {', '.join(self.allowed or ())}")
        if len(allowed) == len(named):
            return assignment
        return replace(assignment, backend=allowed[0], alternatives=tuple(allowed[1:]))


# What the core answers


class MissedAttempt(Exception):
    """What an attempt of a replica met; its replica has the error itself."""


class UnusedGrant(MissedAttempt):
    """A grant was over before its replica used it; the engine never heard of the call."""


def moved_of(call: str, error: BackendElsewhere, assignment: Assignment) -> Moved:
    """Return where a call enters that is mapped to a backend of another pool, with what may follow on that."""
    named = (assignment.backend, *assignment.alternatives)
    others = named[named.index(error.backend) + 1 :] if error.backend in named else ()
    first = assignment.reason if error.backend == assignment.backend else f"{assignment.reason}; an alternative"
    own = replace(assignment, backend=error.backend, alternatives=tuple(others), reason=first)
    return Moved(call, error.pool, flat_assignment(own))


def refused_of(call: str, error: BaseException) -> Refused:
    """Return how a call ends that goes nowhere."""
    if isinstance(error, MissedAttempt):
        return Refused(call, "cause", str(error))
    if isinstance(error, CallerTimedOut):
        return Refused(call, "timeout", str(error))
    more: Flat = {}
    if isinstance(error, BudgetExceeded):
        more = {name: getattr(error, name) for name in ("scope", "name", "figure", "retry_after_s")}
    if isinstance(error, AccessDenied):
        more = {"rule": error.rule}
    if isinstance(error, EngineRefused):
        more = {"status": error.status}
    if isinstance(error, BackendElsewhere):
        return Refused(call, MappingError.__name__, str(error))
    return Refused(call, type(error).__name__, str(error), more)
