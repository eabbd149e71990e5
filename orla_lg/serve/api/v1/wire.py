"""An execute as a wire: no engine speaks it, so each is asked by chat completions, on the way of all other calls."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from orla_lg.core.call import Ask, Usage
from orla_lg.core.inflight import InFlightCall
from orla_lg.serve.api.v1 import answer, request
from orla_lg.wires.chat import CHAT
from orla_lg.wires.wire import Body, ChunkReader, Wire


class ExecuteWire(Wire):
    """One execute. It is made for each: an answer has the figures of its call in it, and an error its name.

    Args:
        request_id: How its caller may name it.
    """

    name = "execute"
    title = "Orla's execute"
    paths = ("/api/v1/execute",)
    path = "api/v1/execute"

    def __init__(self, request_id: str = "") -> None:
        self.request_id = request_id
        self.inflight: InFlightCall | None = None
        """The call that it became."""

    def ask_of(self, body: Body) -> Ask:  # noqa: D102
        return replace(CHAT.ask_of(request.as_chat(body)), model=str(body["backend"]))

    def to_chat(self, body: Body) -> dict[str, Any]:  # noqa: D102
        return request.as_chat(body)

    def from_chat(self, completion: Body, asked: Body) -> dict[str, Any]:  # noqa: D102
        return answer.whole(completion, self._figures)

    def reader(self, asked: Body) -> ChunkReader:  # noqa: D102
        return answer.ExecuteEvents(self._figures)

    def error(self, status: int, message: str, *, kind: str | None = None) -> dict[str, Any]:  # noqa: D102
        return answer.error(message, self.request_id)

    def _figures(self) -> dict[str, Any]:
        """End the call, whose answer is whole, and return what its record says of it."""
        assert self.inflight is not None, "an answer without a call"
        self.inflight.finish()
        return answer.metrics(self.inflight)

    # What no engine sends

    def brings(self, event: bytes) -> bool:  # noqa: D102
        return True

    def usage_in(self, data: bytes) -> Usage | None:  # noqa: D102
        return None

    def ends_well(self, tail: bytes) -> bool:  # noqa: D102
        return False
