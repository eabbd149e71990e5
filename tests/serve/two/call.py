"""A call of a replica: its real steps, carried out one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any

from orla_lg.core.call import Ask, Usage
from orla_lg.core.engine.retry import AttemptFailed
from orla_lg.core.identity import Identity
from orla_lg.core.lifecycle import Send
from orla_lg.core.record import Record
from orla_lg.core.steps import Steps, Waiter, WaitForTurn
from orla_lg.errors import BackendUnavailable
from orla_lg.link.call import LinkedCall
from orla_lg.link.serving import LinkedServing
from tests.serve.two.times import ENGINE_NOTICES_S

if TYPE_CHECKING:
    from tests.serve.two.replica import ReplicaProcess


class ModelCall:
    """One call; it is its own sender."""

    max_attempts = 3

    def __init__(self, process: ReplicaProcess, serving: LinkedServing, number: int) -> None:
        self.process, self.machine = process, process.machine
        self.id = f"{process.name}.{number}"
        self.at_engine = self.first = False
        self.ended = 0
        self.error: BaseException | None = None
        inflight = serving.arrive(
            Identity(f"w{number}", None, "answer"), Ask("a", [{"role": "user", "content": f"question {number}"}]),
            call_id=self.id,
        )  # fmt: skip
        assert isinstance(inflight, LinkedCall)
        self.inflight = inflight
        self._context = Context()
        """Of its caller: what one call holds is no other's."""
        self._turn: Waiter | None = None
        self._steps: Steps | None = serving.serve(inflight, self, self._over)

    def begin(self) -> None:
        self._go(lambda steps: steps.send(None))

    def send(self, inflight: Any) -> Any:
        raise NotImplementedError("its steps are carried out one by one")

    async def asend(self, inflight: Any) -> Any:
        raise NotImplementedError("its steps are carried out one by one")

    def _over(self, record: Record) -> None:
        self.ended += 1

    @property
    def open(self) -> bool:
        return not self.ended and not self.process.dead

    # Its steps

    def _go(self, resume: Callable[[Steps], Any]) -> None:
        assert self._steps is not None
        try:
            step = self._context.run(resume, self._steps)
        except StopIteration:  # the response is being read
            self._steps = None
            return
        except (Exception, asyncio.CancelledError) as error:
            self._steps, self.error = None, error
            return
        if isinstance(step, Send):
            self.at_engine, self.first = True, False
            self.machine.begins(self)
        else:
            assert isinstance(step, WaitForTurn), step
            assert step.timeout_s is None
            self._turn = step.turn
            step.turn.on_settled(lambda: self.process.woken.append(self))

    def goes_on(self) -> None:
        """Go on with what was waited for, if that has come."""
        turn = self._turn
        if turn is None or not turn.settled or self._steps is None:
            return
        self._turn = None
        try:
            turn.result()
        except Exception as error:
            fault = error
            self._go(lambda steps: steps.throw(fault))
        else:
            self._go(lambda steps: steps.send(None))

    # What the engine does, and its caller

    def answers(self) -> None:
        """The first token comes."""
        if not self.first:
            self.first = True
            self._go(lambda steps: steps.send("response"))
            self.inflight.first_token()

    def ends(self) -> None:
        self.answers()
        self._leaves()
        self.inflight.saw(Usage(25, 0, 7))
        self.inflight.finish()

    def misses(self) -> None:
        """The attempt fails before its first token."""
        if not self.first:
            self._leaves()
            self._go(lambda steps: steps.throw(AttemptFailed(RuntimeError("it is busy"), overloaded=True)))

    def cancels(self) -> None:
        """Its caller gives up."""
        self._leaves()
        if self._steps is not None:
            self._turn = None
            self._go(lambda steps: steps.throw(asyncio.CancelledError()))
        else:
            self.inflight.finish("abandoned")

    def cut_off(self) -> None:
        """Its replica ends its request."""
        if not self.at_engine:
            return
        self._leaves(ENGINE_NOTICES_S)
        error = BackendUnavailable(self.inflight.cut or "it was cut off")
        if self.first:
            self.inflight.finish(error)
        else:
            self._go(lambda steps: steps.throw(AttemptFailed(error, unreachable=True)))

    def dies(self) -> None:
        """Its process ends."""
        if self.at_engine:
            self._leaves(ENGINE_NOTICES_S)

    def _leaves(self, after_s: float = 0.0) -> None:
        if self.at_engine:
            self.at_engine = False
            self.machine.leaves(self, after_s)
