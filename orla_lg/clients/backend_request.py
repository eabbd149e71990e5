"""A call's request as one backend gets it: its wire, its body, and what of it the caller did not ask for.

Nothing of HTTP is in here: ``sender`` carries it by a caller's HTTP library, the gateway by its own.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from functools import lru_cache
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from orla_lg.clients.fitting import untranslatable
from orla_lg.clients.question import Question
from orla_lg.core.call import OBJECT
from orla_lg.core.engine.backend import Backend, with_fields
from orla_lg.core.inflight import InFlightCall
from orla_lg.openai_api.dialect import STREAM_OPTIONS, Dialect, may_refuse, parted
from orla_lg.wires import chat
from orla_lg.wires.chat import CHAT
from orla_lg.wires.tap import Hides, Mode
from orla_lg.wires.wire import Untranslatable, Wire

_COMPACT = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


class Destination(Protocol):
    """A backend, as what sends to it knows it."""

    @property
    def backend(self) -> Backend:
        """Its configuration."""
        ...

    def dialect_of(self, wire: str) -> Dialect:
        """Return what its engine turned out not to take on one wire, by the wire's name."""
        ...


U = TypeVar("U", bound=Destination)


class BackendRequest(NamedTuple, Generic[U]):
    """One request as it is sent to one backend."""

    to: U
    dialect: Dialect
    question: Question
    wire: Wire
    """The engine's."""
    body: Mapping[str, Any]
    mode: Mode
    hides: Hides | None
    """Events that the engine sends because of what we added, and that the caller does not get."""
    added: Collection[str]
    """Fields of the body that the caller did not ask for, and that may be left out."""
    said: Mapping[str, Any]
    """The body without them."""
    guards: Mapping[str, Any]
    """Fields that may not be left out."""

    @property
    def translates(self) -> bool:
        """Whether the engine is asked in another wire than the caller's."""
        return self.wire is not self.question.wire

    def content(self) -> bytes:
        """Return the body as bytes."""
        return written(self.body)

    def may_cause(self, status: int, text: str) -> bool:
        """Whether the engine, which answered with an error, may have refused what we added."""
        return may_refuse(self.added, status, text)

    def refused(self, status: int, text: str) -> None:
        """Note that the same request was taken without what we added."""
        self.dialect.learn(self.added, text, status)

    def without_ours(self) -> BackendRequest[U]:
        """Return the same request with nothing added but what keeps workflows apart."""
        return self._replace(body=with_fields(self.said, self.guards), hides=None, added=())


def request_to(to: U, inflight: InFlightCall, question: Question) -> BackendRequest[U]:
    """Return the request for the backend that the call's attempt runs on."""
    assert inflight.scheduler is not None and inflight.assignment is not None and inflight.model is not None
    wire = question.wire_for(inflight.scheduler)
    mode: Mode = "stream" if question.wire.streams(question.body) else "plain"
    meant = question.body if wire is question.wire else _translated(inflight, question, mode)
    said = wire.with_model(meant, inflight.model, inflight.assignment.parameters)
    _note_prompt(inflight, question, said, wire)
    dialect = to.dialect_of(wire.name)
    fields: Mapping[str, Any] = {} if wire.embeds else wire.fields(inflight.request_fields())
    if dialect.refused:
        fields = dialect.without_refused(fields)
    body = with_fields(said, fields)
    body["model"] = said["model"]
    guards, added = parted(fields, said)
    hides: Hides | None = None
    options = body.get(STREAM_OPTIONS) or {}
    wants = mode == "stream" and wire.counts_on_demand and STREAM_OPTIONS not in dialect.refused
    counts = inflight.counts_streams or not question.wire.counts_on_demand  # such a stream always ends with counts
    if wants and counts and isinstance(options, OBJECT) and not options.get("include_usage"):
        body[STREAM_OPTIONS] = {**options, "include_usage": True}
        added.add(STREAM_OPTIONS)
        hides = chat.is_usage_only if wire is question.wire else None
    return BackendRequest(to, dialect, question, wire, body, mode, hides, added, said, guards)


def _translated(inflight: InFlightCall, question: Question, mode: Mode) -> Mapping[str, Any]:
    """Return the request as a chat completion's, streamed where the caller's is."""
    try:
        said = {name: value for name, value in question.translated.items() if name != "stream"}
    except Untranslatable as error:  # known to the mapping already, unless the engine became another one since
        raise untranslatable(inflight, question, error) from error
    return {**said, "stream": True} if mode == "stream" else said


def _note_prompt(inflight: InFlightCall, question: Question, said: Mapping[str, Any], wire: Wire) -> None:
    """Note what the request begins with, as a chat completion: so it may be warmed later."""
    if wire is CHAT:
        inflight.sends(said)
    elif wire.templated and not wire.embeds and question.is_translatable:
        inflight.sends({**question.translated, "model": said["model"]})


def written(body: Mapping[str, Any]) -> bytes:
    """Return a JSON object as bytes."""
    try:
        return _COMPACT.encode(body).encode()
    except UnicodeEncodeError:  # half a character, as JSON can escape it
        return json.dumps(body).encode()


@lru_cache(maxsize=256)
def address_of(base: str, wire: Wire) -> str:
    """Return where a backend serves *wire*, whose OpenAI-compatible base is *base*."""
    base, path = base.rstrip("/"), wire.path
    if path.startswith("v1/"):
        return f"{base}/{path.removeprefix('v1/')}"
    return f"{base.removesuffix('/v1')}/{path}"
