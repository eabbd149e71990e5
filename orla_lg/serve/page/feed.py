"""What open pages are sent: one subscription, one state a second, and each message encoded once for all of them.

Changes are gathered and sent ten times a second at most, and only what changed; so what a viewer gets is bounded by
the number of stages and workflows, whatever the number of calls. Without a viewer there is neither a subscription nor
a timer.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
from collections.abc import Callable
from typing import Any

from orla_lg import __version__
from orla_lg.control.state import ProcessState, state
from orla_lg.core.call import Call
from orla_lg.core.lookahead.forecast import Forecast
from orla_lg.core.serving import Serving
from orla_lg.serve.access.access import Access, Denied
from orla_lg.serve.access.keys import KeyScope
from orla_lg.serve.access.sessions import SignIns
from orla_lg.serve.page.core_view import core_view
from orla_lg.serve.page.drawn_graphs import drawn
from orla_lg.serve.page.live_calls import MOST_CALLS, LiveCalls
from orla_lg.serve.page.viewer import PageViewer

log = logging.getLogger("orla_lg")

MOST_VIEWERS = 32
TICK_S = 0.1
STATE_S = 1.0
KEEP_S = 10.0
"""After the last viewer left: a page that is loaded again finds what was there."""
MOST_SEEDED = 2_000
"""Of the kept records, looked through for workflows when the first page is opened: the newest."""
MOST_GRAPHS = 40
"""Drawn: those that were wrapped last."""
DOUBTS = 3
"""So many states in a row must have fewer waiting calls than the events told, before the queues are read again."""


def message(event: str, data: Any) -> bytes:
    """Return a message of the stream: one line of JSON, whatever names hold."""
    line = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return f"event: {event}\ndata: {line}\n\n".encode("utf-8", "backslashreplace")


class EventFeed:
    """Feeds all open pages. Of the event loop.

    Args:
        serving: The core.
        access: Whether a viewer may still see it.
        sign_ins: Whether a viewer is still signed in.
        condition: Returns whether the core takes calls.
    """

    def __init__(
        self, serving: Serving, access: Access, sign_ins: SignIns, condition: Callable[[], str] = lambda: "ready"
    ) -> None:
        self._serving, self._access, self._sign_ins, self._condition = serving, access, sign_ins, condition
        self._viewers: dict[PageViewer, None] = {}
        self._live = LiveCalls(serving.book.run)
        self._unsubscribe: Callable[[], None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._next_state_s = self._left_s = 0.0
        self._graphs: list[Forecast] = []
        self._was: list[Any] = []
        self._doubts: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._viewers)

    # Viewers

    def enter(self, viewer: PageViewer) -> None:
        """Begin to feed a viewer, with all that is there now.

        Raises:
            Denied: As many look as may at once.
        """
        if len(self._viewers) >= MOST_VIEWERS:
            raise Denied(503, f"{MOST_VIEWERS} pages are open, as many as may be at once", "server_error", 5.0)
        self._begin()
        self._viewers[viewer] = None
        if viewer.workflow is not None:
            self._watch()
        viewer.put(self._hello(viewer) + _graphs_message(self._newest_graphs()) + self._state_message())
        stages, workflows = self._live.all_now()
        viewer.put(
            message("stages", {
                "names": [[each.number, each.graph, each.stage] for each in stages],
                "rows": [each.row() for each in stages],
            })
            + message("workflows", {"rows": [each.row() for each in workflows], "gone": [], "all": True})
        )  # fmt: skip
        if viewer.workflow is not None:
            spans = self._live.spans(viewer.workflow, self._serving.records.records())
            viewer.put(message("spans", {"workflow": viewer.workflow, "spans": spans, "all": True}))

    def leave(self, viewer: PageViewer) -> None:
        """Feed a viewer no longer. Idempotent."""
        if self._viewers.pop(viewer, viewer) is None:
            self._watch()
            self._left_s = asyncio.get_running_loop().time()

    def close(self, why: str = "the server ends") -> None:
        """End all streams, and look no longer."""
        for viewer in list(self._viewers):
            viewer.end(message("bye", {"why": why}))
            if viewer.is_stuck:
                viewer.cut_off()
        self._viewers.clear()
        self._end()

    def _watch(self) -> None:
        self._live.watch({each.workflow for each in self._viewers if each.workflow is not None})

    def _begin(self) -> None:
        if self._unsubscribe is None:
            serving = self._serving
            self._live = LiveCalls(serving.book.run)
            self._unsubscribe = serving.records.subscribe(self._live.heard)
            self._live.seed(serving.book.runs(), self._in_queues(), serving.records.records()[-MOST_SEEDED:])
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(TICK_S, self._tick)

    def _in_queues(self) -> list[tuple[str, Call]]:
        found: list[tuple[str, Call]] = []
        for name, scheduler in self._serving.schedulers.items():
            with scheduler.lock:
                queued = list(itertools.islice(scheduler.queue, MOST_CALLS - len(found)))
            found += [(name, each.call) for each in queued]
        return found

    def _end(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._unsubscribe is not None:
            self._unsubscribe()
            self._unsubscribe = None

    # What is sent

    def _tick(self) -> None:
        loop = asyncio.get_running_loop()
        now_s = loop.time()
        self._timer = None
        if not self._viewers and now_s - self._left_s > KEEP_S:
            self._end()
            return
        try:
            is_due = now_s >= self._next_state_s or self._standing() != self._was
            self._send_changes(workflows=is_due)
            if self._viewers and is_due:
                begun_s = time.thread_time()
                self._look_at_viewers(now_s)
                self._send_state()
                # What a state costs is bounded: a twentieth of a core at most.
                self._next_state_s = now_s + max(STATE_S - TICK_S / 2, 20 * (time.thread_time() - begun_s))
        except Exception:
            log.exception("the live page could not be fed")
        self._timer = loop.call_later(TICK_S, self._tick)

    def _standing(self) -> list[Any]:
        """Return what a click or a fault changes, and is to be seen at once."""
        found: list[Any] = [self._condition()]
        for scheduler in self._serving.schedulers.values():
            queue = scheduler.queue
            found += (queue.paused, queue.max_concurrency, scheduler.health.breaker.trips)
        return found

    def _send(self, data: bytes) -> None:
        for viewer in self._viewers:
            viewer.put(data)

    def _send_changes(self, *, workflows: bool) -> None:
        changes = self._live.take(workflows=workflows)
        if not self._viewers:
            return
        at_s = round(self._serving.clock(), 4)
        parts: list[bytes] = []
        if changes.stages or changes.new:
            parts.append(
                message("stages", {
                    "at": at_s,
                    "names": [[each.number, each.graph, each.stage] for each in changes.new],
                    "rows": [each.row() for each in changes.stages],
                })
            )  # fmt: skip
        if changes.workflows or changes.gone:
            rows = [each.row() for each in changes.workflows]
            parts.append(message("workflows", {"rows": rows, "gone": changes.gone}))
        if parts:
            self._send(b"".join(parts))
        for number, spans in changes.spans.items():
            data = message("spans", {"workflow": number, "at": at_s, "spans": spans})
            for viewer in self._viewers:
                if viewer.workflow == number:
                    viewer.put(data)

    def _look_at_viewers(self, now_s: float) -> None:
        """End the streams of keys and sessions that no longer hold, and of viewers that do not read."""
        for viewer in list(self._viewers):
            viewer.look(now_s)
            signed_in = viewer.session is None or self._sign_ins.holds(viewer.session)
            if not (signed_in and self._access.still(viewer.caller, KeyScope.VIEW)):
                viewer.end(message("bye", {"why": "key"}))
                self.leave(viewer)

    def _send_state(self) -> None:
        if self._viewers:
            graphs, self._was = self._newest_graphs(), self._standing()
            if len(graphs) != len(self._graphs) or any(map(_differ, graphs, self._graphs)):
                self._graphs = graphs
                self._send(_graphs_message(graphs))
            self._send(self._state_message())

    def _state_message(self) -> bytes:
        now = state(self._serving)
        self._compare(now)
        return message("state", core_view(now, self._condition()))

    def _compare(self, now: ProcessState) -> None:
        """Read the queues again where events told of more waiting calls than there are."""
        waiting = self._live.waiting()
        for name, backend in now.backends.items():
            doubted = waiting[name] > backend.waiting
            self._doubts[name] = self._doubts.get(name, 0) + 1 if doubted else 0
            if self._doubts[name] >= DOUBTS:
                self._doubts[name] = 0
                self._live.keep_waiting(name, {call.id for at, call in self._in_queues() if at == name})

    def _newest_graphs(self) -> list[Forecast]:
        return self._serving.lookahead.graphs()[-MOST_GRAPHS:]

    def _hello(self, viewer: PageViewer) -> bytes:
        caller = viewer.caller
        may_control = KeyScope.CONTROL in caller.scopes and self._access.still(caller, KeyScope.CONTROL)
        return message("hello", {
            "version": __version__, "name": caller.name, "keyed": caller.key_id is not None,
            "signed_in": viewer.session is not None, "control": may_control,
            "at": round(self._serving.clock(), 4), "watching": viewer.workflow,
        })  # fmt: skip


def _graphs_message(graphs: list[Forecast]) -> bytes:
    return message("graphs", [drawn(each.graph, each.structure, each.homes) for each in graphs])


def _differ(one: Forecast, other: Forecast) -> bool:
    return one is not other
