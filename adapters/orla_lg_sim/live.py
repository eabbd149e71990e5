"""The simulated engine on a real clock: what a server needs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable

from orla_lg_sim.engine import SimEngine
from orla_lg_sim.request import Event, Kind, SimRequest


class LiveEngine:
    """Runs a ``SimEngine`` on the event loop's timers; used from one loop only.

    Args:
        engine: It.
        speed: Simulated seconds in a real one.
        clock: Real seconds.
    """

    def __init__(self, engine: SimEngine, speed: float = 1.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.engine = engine
        self._speed = speed
        self._clock = clock
        self._began_s = clock()
        self._queues: dict[str, asyncio.Queue[Event]] = {}
        self._timer: asyncio.TimerHandle | None = None

    @property
    def now(self) -> float:
        """Simulated seconds since the beginning."""
        return (self._clock() - self._began_s) * self._speed

    async def run(self, request: SimRequest) -> AsyncGenerator[Event]:
        """Run a request and yield what happens to it; closing the generator aborts it.

        Raises:
            ValueError: It can never run, or its id is taken.
        """
        self.engine.submit(request, self.now)
        queue = self._queues[request.id] = asyncio.Queue()
        self._arm()
        try:
            while True:
                event = await queue.get()
                yield event
                if event.kind is Kind.FINISHED:
                    return
        finally:
            if self._queues.get(request.id) is queue:
                del self._queues[request.id]
                self.engine.abort(request.id, self.now)
                self._tick()

    def abort(self, id: str) -> bool:
        """End a request; whoever reads it sees it finished with what it has. Returns whether it was there."""
        queue = self._queues.get(id)
        if queue is None or not self.engine.abort(id, self.now):
            return False
        queue.put_nowait(Event(Kind.FINISHED, id, self.now, -1, 0, 0, 0))
        self._tick()
        return True

    def catch_up(self) -> SimEngine:
        """Return the engine as it is now."""
        self._tick()
        return self.engine

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _tick(self) -> None:
        for event in self.engine.advance(self.now):
            if (queue := self._queues.get(event.id)) is not None:
                queue.put_nowait(event)
        self._arm()

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if (at_s := self.engine.next_event_s()) is not None:
            wait_s = max(0.0, (at_s - self.now) / self._speed)
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._tick)
