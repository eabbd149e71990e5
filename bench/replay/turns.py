"""Turns: the agents of bench/pressure, of different lengths, under a policy and a cap, with a records file."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

from bench.lib.calls import JobSeen, Turn
from bench.lib.core import Ask, Backend
from bench.lib.engines import VLLM, Llama, Message
from bench.lib.virtual import PLAIN, Runs, probe_of, request_of
from bench.lib.workflows import Arm, Session, agent, turn_of
from bench.pressure.workflows import CALLS, Load, LocalWords
from orla_lg import Backend as Engine
from orla_lg.testing.virtual import StillAdapter
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.text import prose

POLICIES = ("fcfs", "workflow_fcfs", "las")


def arm(policy: str, records: Path) -> Arm:
    """Return the way in which a policy serves the agents."""
    return Arm(policy, {"policy": policy, "admission": False, "warm_up": False, "records_file": records})


def of_different_lengths(load: Load) -> Load:
    """Return the same load with agents that make one to five calls: where all are as long, few policies differ."""
    dice = Random(load.seed)
    lengths = [1 + number % CALLS for number in range(len(load.sessions))]
    dice.shuffle(lengths)
    cut = (
        Session(each.begin_s, each.said[:calls], each.waits_s[: calls - 1])
        for each, calls in zip(load.sessions, lengths, strict=True)
    )
    return replace(load, sessions=tuple(cut))


async def live_turn(engine: VLLM | Llama, kind: str, arm: Arm, load: Load, cap: int) -> Turn:
    """Run one policy on a real engine, from an empty cache."""
    extra = {"max_tokens": load.answer_tokens, "extra_body": {"ignore_eos": True}}

    def graph(model: Any) -> Any:
        return agent(load.sessions, model, system=load.system, extra=lambda number: extra).compile()

    backend = Engine("engine", engine.url, engine.model, engine=kind, max_concurrency=cap)
    return await turn_of(arm, engine, backend, load.sessions, graph, seed=load.seed, shared=load.shared_tokens)


def simulated_turn(parameters: EngineParameters, words: LocalWords, arm: Arm, load: Load, cap: int) -> Turn:
    """Run one policy on a simulated engine, in virtual time."""
    assert arm.orla is not None
    made, engine = Turn(arm.name, load.seed, load.shared_tokens, [], []), SimEngine(parameters)
    options = {name: value for name, value in arm.orla.items() if name not in ("policy", "warm_up")}
    policies = dict.fromkeys(("stage_policy", "request_policy"), arm.orla["policy"])
    runs = Runs(
        Backend("engine", "http://engine/v1", max_concurrency=cap), engine,
        adapter=StillAdapter(probe_of(parameters, PLAIN)), **options, **policies,
    )  # fmt: skip

    async def play(number: int, session: Session) -> None:
        await asyncio.sleep(session.begin_s)
        arrived_s, history, state = runs.clock(), load.opening(session), runs.begin(f"run-{number}", graph="session")
        for nth in range(len(session.said)):
            answer = prose(Random(f"{load.seed} {number} {nth}"), load.answer_tokens)
            ask = Ask("engine", tuple(history), stream=True, max_tokens=load.answer_tokens)
            request = request_of(words.tokenizer, f"{number}/{nth}", history, answer, parameters.block_tokens)
            with runs.node(state, "agent"):
                await runs.call(state, "agent", ask, request, step=2 * nth)
            if nth < len(session.said) - 1:
                with runs.node(state, "tool"):
                    await asyncio.sleep(session.waits_s[nth])
                history += said_next(answer, session.said[nth + 1])
        runs.end(state)
        made.jobs.append(JobSeen(number, arrived_s, runs.clock()))

    async def all_() -> None:
        async with asyncio.TaskGroup() as group:
            for number, session in enumerate(load.sessions):
                group.create_task(play(number, session))

    with runs.virtual as virtual:
        virtual.run(all_())
    return made


def said_next(answer: Sequence[str], user: str) -> list[Message]:
    """Return what an agent's history gains by an answer and what follows it."""
    return [{"role": "assistant", "content": "".join(answer)}, {"role": "user", "content": user}]
