"""Questions to the core and changes to it, from a thread that waits for the answer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from typing import Any

from orla_lg import errors
from orla_lg.core.operation.steering import Keep
from orla_lg.core.policies import RequestChoice, StageChoice
from orla_lg.core.steps import Steps, Waiter, WaitForTurn
from orla_lg.core.workflow import WorkflowBook
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaError, shown
from orla_lg.link.connection import Link
from orla_lg.link.messages import Flat, Request, RequestDone

ANSWER_S = 5.0
"""How long the core may take for an answer."""

BESIDE_S = 1.0
"""How much longer than its own patience a drain is waited for."""


def error_of(kind: str, text: str, more: Mapping[str, Any] | None = None) -> Exception:
    """Return the error that the core named, as its class is here."""
    found = getattr(errors, kind, None) if kind in errors.__all__ else None
    if not (isinstance(found, type) and issubclass(found, OrlaError)):
        return OrlaError(f"{kind}: {text}")
    try:
        return found(text, **(more or {}))
    except TypeError:  # of a newer core
        return OrlaError(f"{kind}: {text}")


class Answer:
    """What one request waits for."""

    __slots__ = ("done", "turn")

    def __init__(self) -> None:
        self.turn = Waiter()
        self.done: RequestDone | None = None


class Requests:
    """The requests of one replica that have no answer yet."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._open: dict[int, Answer] = {}

    def steps(self, what: str, more: Flat, timeout_s: float | None = ANSWER_S) -> Steps:
        """Ask the core; the result is its answer.

        Raises:
            BackendUnavailable: There is no core, or it does not answer.
            OrlaError: What the core says of the request.
        """
        number, answer = next(self._numbers), Answer()
        self._open[number] = answer
        try:
            if not self._link.send(Request(number, what, more)):
                raise BackendUnavailable(f"the core cannot be asked for {what}: {self._link.fault}")
            yield WaitForTurn(answer.turn, timeout_s)
        except TimeoutError:
            raise BackendUnavailable(f"the core did not answer {what} within {timeout_s} s") from None
        finally:
            del self._open[number]
        done = answer.done
        assert done is not None
        if done.error is not None:
            raise error_of(done.error, str(done.value))
        return done.value

    def ask(self, what: str, more: Flat, timeout_s: float | None = ANSWER_S) -> Any:
        """Ask the core, and wait for its answer; as ``steps``."""
        steps = self.steps(what, more, timeout_s)
        try:
            wait = next(steps)
            try:
                wait.run()
            except BaseException as error:  # noqa: BLE001 - handed to the steps, which raise it again
                steps.throw(error)
            steps.send(None)
        except StopIteration as end:
            return end.value
        raise AssertionError("a request waits once")

    def answered(self, done: RequestDone) -> None:
        """Take an answer in."""
        if (answer := self._open.get(done.number)) is not None:
            answer.done = done
            answer.turn.come()

    def lost(self, why: str) -> None:
        """End all that wait: the core is gone."""
        for answer in list(self._open.values()):
            answer.turn.fail(BackendUnavailable(f"the core was lost before it answered: {why}"))


class LinkedSteering:
    """The levers of the core, pulled from here (``core.operation.steering``)."""

    def __init__(self, requests: Requests, book: WorkflowBook) -> None:
        self._requests = requests
        self._book = book

    def pause(self, backend: str) -> None:
        """Grant nothing more there.

        Raises:
            ConfigError: There is no such backend.
        """
        self._requests.ask("pause", {"backend": backend})

    def resume(self, backend: str) -> None:
        """Let calls go there again.

        Raises:
            ConfigError: There is no such backend.
        """
        self._requests.ask("resume", {"backend": backend})

    def drain(self, backend: str, timeout_s: float | None) -> Steps:
        """Pause a backend and wait until nothing is in flight there; the result is whether that is so.

        Raises:
            ConfigError: There is no such backend, or *timeout_s* is negative.
        """
        patience_s = None if timeout_s is None else timeout_s + BESIDE_S
        return bool(
            (yield from self._requests.steps("drain", {"backend": backend, "timeout_s": timeout_s}, patience_s))
        )

    def prioritize(self, run: str, priority: float, tenant: str | None = None) -> bool:
        """Give the calls of a run, or of a thread's open runs, another priority; False if no such run is open."""
        found = self._book.open_on(run, tenant)
        for state in found:
            state.priority = priority  # of calls to come, and of those said again to another core
        told = False
        with contextlib.suppress(BackendUnavailable):
            told = bool(self._requests.ask("prioritize", {"run": run, "priority": priority, "tenant": tenant}))
        return told or bool(found)

    def set_policy(
        self, stage_policy: StageChoice | None, request_policy: RequestChoice | None, backend: str | None
    ) -> None:
        """Order calls by other policies; on one backend, or on all (``None``).

        Raises:
            ConfigError: A policy is no name, or unknown, or cannot order the calls that wait.
        """
        table = {"stage_policy": _names("stage_policy", stage_policy), "backend": backend}
        table["request_policy"] = _names("request_policy", request_policy)
        self._requests.ask("set_policy", table)

    def set_limit(self, backend: str, max_concurrency: int | Keep | None, capacity: int | Keep) -> None:
        """Bound a backend's calls in flight (``None``: as the engine bounds them), and those that may wait.

        Raises:
            ConfigError: There is no such backend, or a limit is not a whole number in its range.
        """
        limits = {"max_concurrency": max_concurrency, "capacity": capacity}
        given = {name: limit for name, limit in limits.items() if not isinstance(limit, Keep)}
        self._requests.ask("set_limit", {"backend": backend, **given})


def _names(where: str, policy: Any) -> Any:
    """Return a policy's name, or a table of names.

    Raises:
        ConfigError: It is an object, which cannot cross.
    """
    named = policy.values() if isinstance(policy, Mapping) else () if policy is None else (policy,)
    for each in named:
        if not isinstance(each, str):
            raise ConfigError(
                f"{where}: {shown(each)} is an object, and the core that orders calls is another process; name a "
                'policy of its own, or give "module:name" in its configuration'
            )
    return dict(policy) if isinstance(policy, Mapping) else policy
