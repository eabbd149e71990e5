"""A workflow that is moved, in virtual time on two simulated engines: what its next call waits for.

    python -m bench.move.simulated

    stays    not moved
    warmed   moved, and its last prompt prefilled ahead, as far as that comes before the call
    cold     moved, with warm-ups off

Engines are a small model on two CPU cores, and one as on a GPU (``bench.warm.simulated``); cells are medians over
the seeds of the time to the first token, and of what was found cached.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from random import Random
from statistics import median
from typing import Any

from bench.lib import core
from bench.lib.command import parser
from bench.lib.figures import table
from bench.lib.flags import count
from bench.lib.virtual import probe_of, request_of
from bench.warm.simulated import ENGINES, NATIVE, Message, Warming, says, text
from orla_lg.testing.virtual import VirtualServing
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import SimRequest
from orla_lg_sim.text import prose, tokenizer_of

STAYS, WARMED, COLD = "stays", "warmed", "cold"
ARMS = (STAYS, WARMED, COLD)
WAITS_S = {"gpu": (0.1, 0.5, 2.0), "cpu": (1.0, 10.0, 60.0)}


class Pair:
    """A core before two engines of one model."""

    def __init__(self, parameters: EngineParameters, *, warm_up: bool) -> None:
        self._parameters, self._words, self._numbers = parameters, tokenizer_of(None), itertools.count(1)
        self._requests: dict[str, SimRequest] = {}
        engines = {name: SimEngine(parameters) for name in ("old", "new")}
        probe = probe_of(parameters, NATIVE, "1")
        adapters = {name: Warming(probe, engine, self._warms(name)) for name, engine in engines.items()}
        backends = {
            core.Backend(name, f"http://{name}/v1", model="m", engine="sim", max_concurrency=8): engine
            for name, engine in engines.items()
        }
        self.virtual = VirtualServing[SimRequest](
            backends, self._sent, adapters=adapters, warm_up=core.WarmUp() if warm_up else None
        )

    def _warms(self, name: str) -> Any:
        async def warm(body: Mapping[str, Any]) -> core.Warmed:
            request = self._of(f"warm {next(self._numbers)}", body["messages"], [" a"])
            event: Any = await self.virtual._drivers[name].run(request.id, request, lambda: None)
            return core.Warmed(core.Effect.WARMED, core.Usage(event.prompt_tokens, event.cached_tokens, 1))

        return warm

    def _of(self, name: str, messages: Sequence[Message], answer: Sequence[str]) -> SimRequest:
        return request_of(self._words, name, messages, answer, self._parameters.block_tokens)

    def _sent(self, inflight: core.InFlightCall) -> SimRequest:
        inflight.sends({"messages": inflight.call.ask.messages, "model": "m"})
        return self._requests.pop(inflight.call.id)

    async def call(self, state: core.RunState, messages: list[Message], answer: Sequence[str]) -> core.Record:
        serving = self.virtual.serving
        ask, identity = core.Ask("old", list(messages), stream=True), core.Identity(state.workflow, state.id, "say")
        inflight = core.arrive(serving.services, identity, ask, call_id=f"call {next(self._numbers)}")
        self._requests[inflight.call.id] = self._of(inflight.call.id, messages, answer)
        return await self.virtual.serve(inflight)


def turn(arm: str, engine: str, wait_s: float, seed: int) -> core.Record:
    """Return the record of the call after the move, or after none."""
    parameters, tokens = ENGINES[engine]
    pair, dice = Pair(parameters, warm_up=arm != COLD), Random(f"{engine} {seed}")

    async def agent() -> core.Record:
        serving = pair.virtual.serving
        state = serving.progress.run_started("run", thread="t")
        answer = prose(dice, 24)
        history = [says("user", text(dice, tokens))]
        await pair.call(state, history, answer)
        if arm != STAYS:
            assert serving.steering.move("t", "new")
        await asyncio.sleep(wait_s)
        history += [says("assistant", "".join(answer)), says("user", text(dice, 60))]
        return await pair.call(state, history, prose(dice, 24))

    with pair.virtual as virtual:
        return virtual.run(agent())


def main() -> None:
    options = parser("move.simulated", __doc__)
    options.add_argument("--seeds", type=count, default=5, help="prompts drawn (5)")
    seeds, rows = options.parse_args().seeds, list[list[str]]()
    for engine, waits_s in WAITS_S.items():
        for wait_s in waits_s:
            for arm in ARMS:
                found = [turn(arm, engine, wait_s, seed) for seed in range(seeds)]
                ttft_s, cached = (median(each) for each in zip(
                    *((record.ttft_s or 0.0, record.cached_tokens or 0) for record in found), strict=True
                ))  # fmt: skip
                shown = [engine, f"{wait_s:g} s"] if arm == STAYS else ["", ""]
                rows.append([*shown, arm, f"{ttft_s:.3f}", f"{cached:,.0f} of {found[0].prompt_tokens:,}"])
    print("\n".join(table(["engine", "call comes after", "workflow", "TTFT, s", "cached, tokens"], rows)))


if __name__ == "__main__":
    main()
