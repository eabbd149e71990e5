"""The same sessions against a live engine and against the simulation, by the same rule.

A session's next call is sent when the one before has ended and its thinking time has passed: the load answers
to the engine's speed, as that of real agents does.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from orla_lg_sim.blocks import chain
from orla_lg_sim.client import TimingClient
from orla_lg_sim.engine import SimEngine
from orla_lg_sim.parameters import EngineParameters
from orla_lg_sim.request import Event, Kind, SimRequest
from orla_lg_sim.sessions import Session, Turn
from orla_lg_sim.text import Tokenizer

Progress = Callable[[int], None]
"""Told how many calls have ended."""


@dataclass(frozen=True, slots=True)
class CallOutcome:
    """What one call saw."""

    session: str
    turn: int
    sent_s: float
    """After the begin of the replay."""
    ttft_s: float
    duration_s: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int = 0
    """Known of the simulation only."""


def outcome_of(session: str, turn: int, sent_s: float, first_s: float, end: Event) -> CallOutcome:
    """Return what a simulated call saw, given its last event."""
    return CallOutcome(
        session,
        turn,
        sent_s,
        first_s - sent_s,
        end.at_s - sent_s,
        end.prompt_tokens,
        end.cached_tokens,
        end.tokens,
        end.preemptions,
    )


@dataclass(frozen=True, slots=True)
class Summary:
    """A replay in figures."""

    calls: int
    ttft_s: float
    """Median."""
    duration_s: float
    """Median, from sending to the last token."""
    mean_ttft_s: float
    mean_duration_s: float
    prompt_tokens: int
    """Of all calls together, like the next."""
    cached_tokens: int
    length_s: float
    """From the first call's sending to the last one's end."""


def summarise(outcomes: Sequence[CallOutcome]) -> Summary:
    """Return the figures of a replay."""
    calls = len(outcomes)
    return Summary(
        calls=calls,
        ttft_s=median(outcome.ttft_s for outcome in outcomes),
        duration_s=median(outcome.duration_s for outcome in outcomes),
        mean_ttft_s=sum(outcome.ttft_s for outcome in outcomes) / calls,
        mean_duration_s=sum(outcome.duration_s for outcome in outcomes) / calls,
        prompt_tokens=sum(outcome.prompt_tokens for outcome in outcomes),
        cached_tokens=sum(outcome.cached_tokens for outcome in outcomes),
        length_s=max(outcome.sent_s + outcome.duration_s for outcome in outcomes),
    )


async def live(
    sessions: Sequence[Session], client: TimingClient, progress: Progress = lambda _: None
) -> list[CallOutcome]:
    """Replay sessions against an engine, in real time.

    Raises:
        BackendUnavailable: The engine does not answer.
        EngineRefused: It answered a call with an error.
    """
    outcomes: list[CallOutcome] = []
    begin_s = time.monotonic()

    async def play(session: Session) -> None:
        await asyncio.sleep(session.begin_s)
        for number, turn in enumerate(session.turns):
            await asyncio.sleep(turn.think_s)
            body = {"messages": turn.messages, "max_tokens": turn.output_tokens, "ignore_eos": True}
            timed = await client.ask(body)
            usage = timed.usage
            outcomes.append(
                CallOutcome(
                    session.id,
                    number,
                    timed.sent_s - begin_s,
                    timed.ttft_s,
                    timed.duration_s,
                    usage.prompt_tokens,
                    usage.cached_tokens or 0,
                    usage.completion_tokens,
                )
            )
            progress(len(outcomes))

    try:
        async with asyncio.TaskGroup() as group:
            for session in sessions:
                group.create_task(play(session))
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return outcomes


class VirtualReplay:
    """Replays sessions against the simulation, as fast as it can be computed."""

    def __init__(self, sessions: Sequence[Session], parameters: EngineParameters, tokenizer: Tokenizer) -> None:
        self.engine = SimEngine(parameters)
        self._sessions = sessions
        self._tokenizer = tokenizer
        self._sends: list[tuple[float, int, int]] = []
        self._flying: dict[str, tuple[int, int, float]] = {}
        self._first_s: dict[str, float] = {}
        self._outcomes: list[CallOutcome] = []

    def run(self) -> list[CallOutcome]:
        """Return what every call saw."""
        for index, session in enumerate(self._sessions):
            self._later(index, 0, session.begin_s)
        while self._sends or self._flying:
            event_s = self.engine.next_event_s()
            if self._sends and (event_s is None or self._sends[0][0] <= event_s):
                self._send(*heapq.heappop(self._sends))
            else:
                assert event_s is not None
                for event in self.engine.advance(event_s):
                    self._heed(event)
        return self._outcomes

    def _later(self, index: int, number: int, after_s: float) -> None:
        turns = self._sessions[index].turns
        if number < len(turns):
            heapq.heappush(self._sends, (after_s + turns[number].think_s, index, number))

    def _send(self, at_s: float, index: int, number: int) -> None:
        session = self._sessions[index]
        name = f"{index}/{number}"
        self._flying[name] = (index, number, at_s)
        request = request_of(name, session.turns[number], self._tokenizer, self.engine.parameters, session.id)
        self.engine.submit(request, at_s)

    def _heed(self, event: Event) -> None:
        if event.kind is Kind.FIRST_TOKEN:
            self._first_s[event.id] = event.at_s
        if event.kind is not Kind.FINISHED:
            return
        index, number, sent_s = self._flying.pop(event.id)
        first_s = self._first_s.pop(event.id)
        self._outcomes.append(outcome_of(self._sessions[index].id, number, sent_s, first_s, event))
        self._later(index, number + 1, event.at_s)


def request_of(
    name: str, turn: Turn, tokenizer: Tokenizer, parameters: EngineParameters, workflow: str | None = None
) -> SimRequest:
    """Return a turn as the engine takes it; what it generates is not what the trace goes on with."""
    prompt = tokenizer.prompt(turn.messages)
    hashes = chain(prompt, parameters.block_tokens)
    return SimRequest(name, len(prompt), turn.output_tokens, hashes, workflow=workflow)


def table(columns: Mapping[str, Sequence[CallOutcome]]) -> str:
    """Return replays side by side; of two, the second's difference from the first."""
    figures = {name: summarise(outcomes) for name, outcomes in columns.items()}
    rows: list[tuple[str, Callable[[Summary], float], str]] = [
        ("calls", lambda figure: figure.calls, "{:.0f}"),
        ("TTFT, median, ms", lambda figure: figure.ttft_s * 1e3, "{:.0f}"),
        ("TTFT, mean, ms", lambda figure: figure.mean_ttft_s * 1e3, "{:.0f}"),
        ("completion, median, ms", lambda figure: figure.duration_s * 1e3, "{:.0f}"),
        ("completion, mean, ms", lambda figure: figure.mean_duration_s * 1e3, "{:.0f}"),
        ("prompt tokens", lambda figure: figure.prompt_tokens, "{:.0f}"),
        ("cached tokens", lambda figure: figure.cached_tokens, "{:.0f}"),
        ("whole replay, s", lambda figure: figure.length_s, "{:.1f}"),
    ]
    lines = ["".join([" " * 24, *[f"{name:>14}" for name in figures]])]
    for title, of, form in rows:
        values = [of(figure) for figure in figures.values()]
        line = f"{title:<24}" + "".join(f"{form.format(value):>14}" for value in values)
        if len(values) == 2 and values[0]:
            line += f"{values[1] / values[0] - 1:>+10.1%}"
        lines.append(line)
    return "\n".join(lines)
