"""Questions to the core and changes to it, from a thread that waits for the answer."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from orla_lg import errors
from orla_lg.core.call import Call
from orla_lg.core.limits.book import LimitBook
from orla_lg.core.limits.limits import NO_LIMITS, Limits, checked
from orla_lg.core.operation.steering import Keep, Steering
from orla_lg.core.policies import ANY_BACKEND, RequestChoice, StageChoice
from orla_lg.core.steps import Steps, Waiter, WaitForTurn
from orla_lg.core.workflow import WorkflowBook
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaError, shown
from orla_lg.link.connection import Link
from orla_lg.link.messages import Flat, Request, RequestDone
from orla_lg.link.views import flat_limits

ANSWER_S = 5.0
"""How long the core may take for an answer."""

RESIDENT_S = 0.05
"""The same for what a mapper asks, which holds its caller up meanwhile."""

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


class RequestAnswer:
    """What one request waits for."""

    __slots__ = ("done", "turn")

    def __init__(self) -> None:
        self.turn = Waiter()
        self.done: RequestDone | None = None


class CoreRequests:
    """The requests of one replica that have no answer yet."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._numbers = itertools.count(1)
        self._open: dict[int, RequestAnswer] = {}

    def steps(self, what: str, more: Flat, timeout_s: float | None = ANSWER_S) -> Steps:
        """Ask the core; the result is its answer.

        Raises:
            BackendUnavailable: There is no core, or it does not answer.
            OrlaError: What the core says of the request.
        """
        number, answer = next(self._numbers), RequestAnswer()
        self._open[number] = answer
        try:
            if not self._link.send(Request(number, what, more)):
                raise BackendUnavailable(f"the core cannot be reached for the request {what!r}: {self._link.fault}")
            yield WaitForTurn(answer.turn, timeout_s)
        except TimeoutError:
            raise BackendUnavailable(f"the core did not answer the request {what!r} within {timeout_s} s") from None
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

    def forked(self) -> None:
        """Forget the parent's, in a child."""
        self._open = {}

    def lost(self, why: str) -> None:
        """End all that wait: the core is gone."""
        for answer in list(self._open.values()):
            answer.turn.fail(BackendUnavailable(f"the core was lost before it answered: {why}"))


class RequestRoutes(Protocol):
    """Which core is asked (``cores.Cores``)."""

    def asked_of(self, backend: str) -> CoreRequests:
        """Return the requests to the core that decides about a backend.

        Raises:
            ConfigError: No core does.
        """
        ...

    def asked_of_all(self) -> Sequence[CoreRequests]:
        """Return the requests to each core."""
        ...

    def own(self, asked: CoreRequests, table: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the entries of a table by backend that concern one core's backends, or any backend."""
        ...


class LinkedSteering(Steering):
    """The levers of the cores, pulled from here: one backend's at the core that decides about it, else at all."""

    def __init__(self, routes: RequestRoutes, book: WorkflowBook) -> None:
        super().__init__({}, book)
        self._routes = routes

    def pause(self, backend: str) -> None:
        """Grant nothing more there.

        Raises:
            ConfigError: There is no such backend.
        """
        self._routes.asked_of(backend).ask("pause", {"backend": backend})

    def resume(self, backend: str) -> None:
        """Let calls go there again.

        Raises:
            ConfigError: There is no such backend.
        """
        self._routes.asked_of(backend).ask("resume", {"backend": backend})

    def drain(self, backend: str, timeout_s: float | None) -> Steps:
        """Pause a backend and wait until nothing is in flight there; the result is whether that is so.

        Raises:
            ConfigError: There is no such backend, or *timeout_s* is negative.
        """
        patience_s = None if timeout_s is None else timeout_s + BESIDE_S
        more, asked = {"backend": backend, "timeout_s": timeout_s}, self._routes.asked_of(backend)
        return bool((yield from asked.steps("drain", more, patience_s)))

    def prioritize(self, run: str, priority: float, tenant: str | None = None) -> bool:
        """Give the calls of a run, or of a thread's open runs, another priority; False if no such run is open."""
        found = self._book.open_on(run, tenant)
        for state in found:
            state.priority = priority  # of calls to come, and of those said again to another core
        told = False
        for asked in self._routes.asked_of_all():
            with contextlib.suppress(BackendUnavailable):
                told |= bool(asked.ask("prioritize", {"run": run, "priority": priority, "tenant": tenant}))
        return told or bool(found)

    def move(self, workflow: str, backend: str | None, tenant: str | None = None) -> bool:
        """Have a workflow's next calls go to a backend, with its cache; False if there is no such workflow.

        Raises:
            ConfigError: There is no such backend.
            BackendUnavailable: There is no core.
        """
        asked_of = self._routes.asked_of_all() if backend is None else [self._routes.asked_of(backend)]
        move = {"workflow": workflow, "backend": backend, "tenant": tenant}
        said = [bool(asked.ask("move", move)) for asked in asked_of]  # each of them, also after one that knows it
        return any(said)

    def set_policy(
        self, stage_policy: StageChoice | None, request_policy: RequestChoice | None, backend: str | None
    ) -> None:
        """Order calls by other policies; on one backend, or on all (``None``).

        Raises:
            ConfigError: A policy is no name, or unknown, or cannot order the calls that wait.
        """
        stages, requests = _names("stage_policy", stage_policy), _names("request_policy", request_policy)
        for name in stages if isinstance(stages, Mapping) else ():
            if name != ANY_BACKEND:
                self._routes.asked_of(name)
        everywhere = self._routes.asked_of_all() if backend is None else [self._routes.asked_of(backend)]
        for asked in everywhere:
            mine = self._routes.own(asked, stages) if isinstance(stages, Mapping) else stages
            if mine or requests is not None or stages is None:
                asked.ask(
                    "set_policy", {"stage_policy": mine or None, "backend": backend, "request_policy": requests}
                )

    def set_limit(self, backend: str, max_concurrency: int | Keep | None, capacity: int | Keep) -> None:
        """Bound a backend's calls in flight (``None``: as the engine bounds them), and those that may wait.

        Raises:
            ConfigError: There is no such backend, or a limit is not a whole number in its range.
        """
        limits = {"max_concurrency": max_concurrency, "capacity": capacity}
        given = {name: limit for name, limit in limits.items() if not isinstance(limit, Keep)}
        self._routes.asked_of(backend).ask("set_limit", {"backend": backend, **given})


class LinkedLimits(LimitBook):
    """The cores' limits, which are the same at all of them; here they are shown, and changed over there."""

    def __init__(self, limits: Limits, clock: Callable[[], float], routes: RequestRoutes) -> None:
        super().__init__(limits, clock)
        self._routes = routes

    @property
    def shared(self) -> Limits:
        """The limits of all replicas together."""
        return self._shared.limits

    @shared.setter
    def shared(self, limits: Limits) -> None:
        for asked in self._routes.asked_of_all():
            asked.ask("limits", {"limits": flat_limits(checked(limits))})
        self.learned(limits)

    def learned(self, limits: Limits) -> None:
        """Note what the core's limits are."""
        self._shared = replace(self._shared, limits=checked(limits))
        self.concern_all = self._shared.limits is not NO_LIMITS


class ResidentTokens:
    """Asks the core once what of a call's prompt lies in a backend's cache."""

    __slots__ = ("_backend", "_call", "_requests", "_tokens")

    def __init__(self, requests: CoreRequests, backend: str, call: Call) -> None:
        self._requests, self._backend, self._call = requests, backend, call
        self._tokens: int | None = None

    def __call__(self) -> int:
        """Return the tokens; 0 where the core does not say at once, as a mapper holds its caller up."""
        if self._tokens is None:
            ask, identity = self._call.ask, self._call.identity
            more = {
                "backend": self._backend, "workflow": identity.name, "tenant": identity.tenant, "tools": ask.tools,
                "hashes": [hashed for hashed, _ in ask.pieces], "chars": [chars for _, chars in ask.pieces],
                "prompt_chars": ask.prompt_chars,
            }  # fmt: skip
            self._tokens = 0
            with contextlib.suppress(BackendUnavailable):
                self._tokens = int(self._requests.ask("resident", more, RESIDENT_S))
        return self._tokens


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
