"""The gateway against the engine itself, beside LiteLLM's proxy; and the gateway's memory."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from bench.lib.command import tell
from bench.lib.engines import started
from bench.lib.figures import Column, Rounds, rotated
from bench.serve.load import Caller, callers, flood, request
from bench.serve.servers import KEY, Server, litellm, orla

ENGINE = "tests.scripted_engine"
DIRECT, ORLA, LITELLM = "direct", "orla-lg serve", "LiteLLM"
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
    begin_s, begin_ms = time.perf_counter(), server.cpu_ms()
    await flood(many, whole, count)
    end_s, end_ms = time.perf_counter(), server.cpu_ms()
    read = await flood(many[:STREAMS_AT_ONCE], stream, streams, CHUNKS)
    stream_cpu_ms = (server.cpu_ms() - end_ms) / streams
    for caller in one + many:
        caller.transport.close()
    return Turn(
        server.name, seed, median(each.whole_ms for each in alone), count / (end_s - begin_s),
        (end_ms - begin_ms) / count, median(each.first_ms for each in read), median(each.whole_ms for each in read),
        stream_cpu_ms,
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
    turns, arms = [], [DIRECT, ORLA, *[LITELLM] * with_litellm]
    with ExitStack() as stack:
        engine = stack.enter_context(started(ENGINE, "--chunks", str(CHUNKS), "--token-s", str(CHUNK_S)))
        servers = {DIRECT: Server(DIRECT, engine), ORLA: stack.enter_context(orla(engine))}
        if with_litellm:
            servers[LITELLM] = stack.enter_context(litellm(engine))
        for seed in range(rounds):
            for arm in rotated(arms, seed):
                tell(f"gateway: round {seed + 1}/{rounds}: {arm}")
                if with_litellm and (slow := servers[LITELLM].process):
                    slow.send_signal(signal.SIGCONT if arm == LITELLM else signal.SIGSTOP)
                turns.append(await turn(servers[arm], seed, count // 10 if arm == LITELLM else count))
        tell(f"gateway: {rounds} rounds", last=True)
    return Rounds(added(turns), arms)


async def memory(requests: int, streams: int) -> list[str]:
    """Send many requests, then open many streams at once, some rounds of them; return what the server held."""
    options = ("--chunks", str(SLOW_CHUNKS), "--token-s", str(SLOW_CHUNK_S))
    with started(ENGINE, *options) as engine, orla(engine) as server:
        whole, stream = (request(server.url, KEY, stream=each) for each in (False, True))
        many, held, after, most = await callers(server.url, AT_ONCE), [server.rss_mib()], list[float](), 0.0
        for number in range(1, SAMPLES + 1):
            await flood(many, whole, requests // SAMPLES)
            held.append(server.rss_mib())
            tell(f"memory: {requests // SAMPLES * number:>7,} requests: {held[-1]:.1f} MiB", last=number == SAMPLES)
        for number in range(1, STREAM_ROUNDS + 1):
            opened = await callers(server.url, streams)
            asyncio.get_running_loop().call_later(SLOW_CHUNKS * SLOW_CHUNK_S / 2, hang_up, opened[1::2])
            async with asyncio.TaskGroup() as group:
                for each in opened[::2]:
                    group.create_task(each.ask(stream, SLOW_CHUNKS))
                for each in opened[1::2]:
                    each.transport.write(stream)
                await asyncio.sleep(SLOW_CHUNKS * SLOW_CHUNK_S / 3)
                most = max(most, server.rss_mib())
            after.append(server.rss_mib())
            tell(
                f"memory: {streams:,} streams, {number}/{STREAM_ROUNDS}: {after[-1]:.1f} MiB", last=number == SAMPLES
            )
    return told(held, after, most, requests, streams)


def hang_up(opened: Iterable[Caller]) -> None:
    for each in opened:
        each.transport.abort()


def told(held: Sequence[float], after: Sequence[float], most: float, requests: int, streams: int) -> list[str]:
    """Return what was found of the memory, and whether that is flat."""
    half, early = held[len(held) // 2], after[len(after) // 2 - 1]
    grown, rest = held[-1] - half, after[-1] - early
    return [
        f"{requests:,} requests: {held[0]:.1f} MiB before, {half:.1f} after half of them, {held[-1]:.1f} after all "
        f"({grown:+.1f})",
        f"{streams:,} open streams: {most:.1f} MiB; after {len(after)} rounds of them {after[-1]:.1f} MiB "
        f"({rest:+.1f} in the second half)",
        "flat" if max(grown, rest) <= GROWTH_MIB else f"goal missed: flat is at most {GROWTH_MIB:+.0f} MiB",
    ]
