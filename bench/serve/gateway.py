"""The gateway against the engine itself, beside LiteLLM's proxy; and the gateway's memory."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from statistics import median

from bench.lib.command import tell
from bench.lib.engines import started
from bench.lib.figures import Column, Rounds, rotated, table
from bench.serve.load import Caller, callers, flood, request
from bench.serve.servers import KEY, Server, litellm, orla, plain, stateless

ENGINE = "tests.scripted_engine"
DIRECT, ORLA, LITELLM = "direct", "orla-lg serve", "LiteLLM"
STATELESS = "orla-lg serve --gateway"
"""Before a core of its own, by a link."""
TURN_S = 180.0
CHUNKS, CHUNK_S = 200, 0.002
AT_ONCE, STREAMS_AT_ONCE = 32, 8
GOAL_ADDED_MS, GOAL_CPU_MS = 0.9, 0.65
SAMPLES, STREAM_ROUNDS, SLOW_CHUNKS, SLOW_CHUNK_S = 10, 10, 20, 0.5
GROWTH_MIB = 4.0
"""In the second half, of what is still called flat: by then the bounds of what is kept of calls are reached."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm in one round; times and CPU time of the server's process in milliseconds."""

    arm: str
    seed: int
    alone_ms: float
    """The median of requests one after the other."""
    per_s: float
    """Requests of ``AT_ONCE`` callers."""
    cpu_ms: float
    """Of each of those."""
    first_ms: float
    """The median of times to a stream's first part."""
    stream_ms: float
    stream_cpu_ms: float
    core_cpu_ms: float = 0.0
    """Of each request, in a core that is another process."""
    added_ms: float = 0.0
    """To the median alone of the direct arm in the same round."""
    added_first_ms: float = 0.0


async def turn(server: Server, seed: int, count: int) -> Turn:
    """Measure a server once."""
    streams = max(count // 50, STREAMS_AT_ONCE)
    one, many = await callers(server.url, 1), await callers(server.url, AT_ONCE)
    whole, stream = (request(server.url, KEY, stream=each) for each in (False, True))
    await flood(many, whole, AT_ONCE * 2)  # warm: connections, code
    alone = await flood(one, whole, count // 4)
    begin_s, begin_ms, core_ms = time.perf_counter(), server.cpu_ms(), server.core_cpu_ms()
    await flood(many, whole, count)
    end_s, end_ms, core_ms = time.perf_counter(), server.cpu_ms(), server.core_cpu_ms() - core_ms
    read = await flood(many[:STREAMS_AT_ONCE], stream, streams, CHUNKS)
    stream_cpu_ms = (server.cpu_ms() - end_ms) / streams
    for caller in one + many:
        caller.transport.close()
    return Turn(
        server.name, seed, median(each.whole_ms for each in alone), count / (end_s - begin_s),
        (end_ms - begin_ms) / count, median(each.first_ms for each in read), median(each.whole_ms for each in read),
        stream_cpu_ms, core_ms / count,
    )  # fmt: skip


def added(turns: Sequence[Turn]) -> Iterable[Turn]:
    """Yield the same with what each adds to the direct arm of its round."""
    direct = {each.seed: each for each in turns if each.arm == DIRECT}
    for each in turns:
        base = direct[each.seed]
        yield replace(each, added_ms=each.alone_ms - base.alone_ms, added_first_ms=each.first_ms - base.first_ms)


COLUMNS = [
    Column("one caller: median, ms", lambda turn: turn.alone_ms),
    Column("added, ms", lambda turn: turn.added_ms),
    Column(f"{AT_ONCE} callers: requests/s", lambda turn: turn.per_s, ",.0f"),
    Column("CPU per request, ms", lambda turn: turn.cpu_ms),
    Column("and in its core, ms", lambda turn: turn.core_cpu_ms),
    Column(f"stream of {CHUNKS}: first part added, ms", lambda turn: turn.added_first_ms),
    Column("whole, ms", lambda turn: turn.stream_ms, ",.0f"),
    Column("CPU per stream, ms", lambda turn: turn.stream_cpu_ms, ",.1f"),
]


def beyond_goal(rounds: Rounds[Turn]) -> list[str]:
    """Return what the gateway is to be, and is not."""
    found = [
        ("adds at the median of one caller", median(rounds.column(ORLA, lambda turn: turn.added_ms)), GOAL_ADDED_MS),
        ("takes CPU per request", median(rounds.column(ORLA, lambda turn: turn.cpu_ms)), GOAL_CPU_MS),
    ]
    return [f"the gateway {what}: {ms:.2f} ms, the goal is {goal:.2f}" for what, ms, goal in found if ms > goal]


async def measure(rounds: int, count: int, with_litellm: bool) -> Rounds[Turn]:
    """Run all arms, interleaved. LiteLLM, which is slow, gets a tenth of the requests, and stands still between."""
    turns, arms = [], [DIRECT, ORLA, STATELESS, *[LITELLM] * with_litellm]
    with ExitStack() as stack:
        engine = stack.enter_context(started(ENGINE, "--chunks", str(CHUNKS), "--token-s", str(CHUNK_S)))
        servers = {DIRECT: Server(DIRECT, engine), ORLA: stack.enter_context(orla(engine))}
        servers[STATELESS] = stack.enter_context(stateless(engine))
        if with_litellm:
            servers[LITELLM] = stack.enter_context(litellm(engine))
        for seed in range(rounds):
            for arm in rotated(arms, seed):
                tell(f"gateway: round {seed + 1}/{rounds}: {arm}")
                if with_litellm and (slow := servers[LITELLM].process):
                    slow.send_signal(signal.SIGCONT if arm == LITELLM else signal.SIGSTOP)
                async with asyncio.timeout(TURN_S):  # an answer that never ends fails the bench, and does not hold it
                    turns.append(await turn(servers[arm], seed, count // 10 if arm == LITELLM else count))
        tell(f"gateway: {rounds} rounds", last=True)
    return Rounds(added(turns), arms)


@dataclass(frozen=True, slots=True)
class Held:
    """What one server held, in MiB."""

    arm: str
    requests: Sequence[float]
    """Before the requests, then after each tenth of them."""
    most: float
    """While all streams were open."""
    streams: Sequence[float]
    """After each round of streams."""

    @property
    def grown(self) -> float:
        """In the second half of the requests, or of the rounds, whichever grew more."""
        half, early = self.requests[len(self.requests) // 2], self.streams[len(self.streams) // 2 - 1]
        return max(self.requests[-1] - half, self.streams[-1] - early)


async def memory(requests: int, streams: int, rounds: int = STREAM_ROUNDS) -> list[str]:
    """Send many requests, then open many streams at once, some rounds of them; return what each server held.

    The arm beside ours is a proxy of the same libraries without anything of ours in it.
    """
    held = [await _held(serve, requests, streams, rounds) for serve in (orla, plain)]
    return told(held, requests, streams)


async def _held(
    serve: Callable[[str], AbstractContextManager[Server]], requests: int, streams: int, rounds: int
) -> Held:
    options = ("--chunks", str(SLOW_CHUNKS), "--token-s", str(SLOW_CHUNK_S))
    with started(ENGINE, *options) as engine, serve(engine) as server:
        whole, stream = (request(server.url, KEY, stream=each) for each in (False, True))
        many, held, after, most = await callers(server.url, AT_ONCE), [server.rss_mib()], list[float](), 0.0
        for number in range(1, SAMPLES + 1):
            await flood(many, whole, requests // SAMPLES)
            held.append(server.rss_mib())
            last = number == SAMPLES
            tell(f"{server.name}: {requests // SAMPLES * number:>7,} requests: {held[-1]:.1f} MiB", last=last)
        for number in range(1, rounds + 1):
            opened = await callers(server.url, streams)
            asyncio.get_running_loop().call_later(SLOW_CHUNKS * SLOW_CHUNK_S / 2, hang_up, opened[1::2])
            async with asyncio.TaskGroup() as group:
                for each in opened[::2]:
                    group.create_task(each.ask(stream, SLOW_CHUNKS))
                for each in opened[1::2]:
                    each.transport.write(stream)
                await asyncio.sleep(SLOW_CHUNKS * SLOW_CHUNK_S / 3)
                most = max(most, server.rss_mib())
            hang_up(opened)  # else those of some rounds are open at once, idle, for as long as the server lets them
            after.append(server.rss_mib())
            tell(f"{server.name}: {streams:,} streams, {number}/{rounds}: {after[-1]:.1f} MiB", last=number == rounds)
    return Held(server.name, held, most, after)


def hang_up(opened: Iterable[Caller]) -> None:
    for each in opened:
        each.transport.abort()


def told(held: Sequence[Held], requests: int, streams: int) -> list[str]:
    """Return what was found of the memory, and whether that is flat."""
    head = (
        "MiB", "before", f"after half of {requests:,} requests", "after all", f"{streams:,} streams open",
        "after half of the rounds", "after all of them", "most in a second half",
    )  # fmt: skip
    rows = [
        [each.arm, *(f"{mib:.1f}" for mib in (
            each.requests[0], each.requests[len(each.requests) // 2], each.requests[-1], each.most,
            each.streams[len(each.streams) // 2 - 1], each.streams[-1],
        )), f"{each.grown:+.1f}"]
        for each in held
    ]  # fmt: skip
    flat = "flat" if held[0].grown <= GROWTH_MIB else f"goal missed: flat is at most {GROWTH_MIB:+.0f} MiB"
    return [*table(head, rows), "", flat]
