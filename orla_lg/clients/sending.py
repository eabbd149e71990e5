"""What a model's client and the HTTP client below it tell each other, while a request is on its way between them.

``SENDING`` goes down: a model's client is sending now. ``Carried`` comes back up: what the client in between must not
see. It is no ``Exception``, since clients take those for failures of the network, and wrap or retry them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

from orla_lg.core.call import Ask, CallerTimeout
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.lifecycle import Sender
from orla_lg.core.serving import Serving
from orla_lg.core.steps import Steps
from orla_lg.errors import OrlaError
from orla_lg.openai_api.client import EngineClients
from orla_lg.wires.watching import AnswerWatch


class CallSite(Protocol):
    """Where in a wrapped graph a request is made, and the core that serves it."""

    @property
    def serving(self) -> Serving:
        """The core."""
        ...

    @property
    def clients(self) -> Mapping[str, EngineClients]:
        """The clients of each backend, by name."""
        ...

    @property
    def untranslatable(self) -> str:
        """What becomes of a request that no backend it is mapped to can be asked: ``external`` or ``error``."""
        ...

    @property
    def of_model(self) -> bool:
        """Whether a run of a LangChain model makes the request."""
        ...

    def is_first(self, field: str) -> bool:
        """Whether *field* keeps a request from being translated for the first time."""
        ...

    def take(self) -> None:
        """Note that the request is the model run's own: what follows in its context is not."""
        ...

    def give_back(self) -> None:
        """Note that the model run has no answer yet: its client may ask again."""
        ...

    def arrive(self, ask: Ask, timeout: CallerTimeout | None) -> InFlightCall:
        """Return the call."""
        ...

    def watch(self, inflight: InFlightCall, body: Mapping[str, Any]) -> AnswerWatch | None:
        """Return what hears the answer to *body*, a request on any wire; ``None``: nothing does."""
        ...

    def steps(self, inflight: InFlightCall, sender: Sender) -> Steps:
        """Return the steps of the call."""
        ...


@dataclass(frozen=True, slots=True)
class Sending:
    """A model's client sends a request."""

    max_attempts: int = 1
    """So often it would try by itself. With more than one it sends again what is *passing*."""
    site: CallSite | None = None
    """Where, if that is known already."""


SENDING: ContextVar[Sending | None] = ContextVar("orla_sending", default=None)


class Carried(BaseException):
    """Comes up through a model's client, which knows nothing of it; the wrapper around the client opens it."""

    def __init__(self, error: OrlaError | None = None, passing: PassedBy | None = None) -> None:
        super().__init__()
        self.error = error
        """Ours, to be raised as it is."""
        self.passing = passing


@dataclass(frozen=True, slots=True)
class PassedBy:
    """A request that goes where its code says; the client sends it as it would have without us."""

    inflight: InFlightCall
    body: Mapping[str, Any]
    """What the client had sent: what it made that of may be used up."""

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """End the call with what happens inside."""
        try:
            yield
        except BaseException as error:
            self.inflight.finish(error)
            raise
        self.inflight.finish()


@contextmanager
def announced(sending: Sending) -> Iterator[None]:
    """Let the HTTP client know, inside, that a model's client sends."""
    token = SENDING.set(sending)
    try:
        yield
    finally:
        SENDING.reset(token)
