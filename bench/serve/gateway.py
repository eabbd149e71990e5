"""The gateway against the engine itself, beside LiteLLM's proxy; and the gateway's memory."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from statistics import median

from bench.lib.command import tell
from bench.lib.engines import started
from bench.lib.figures import Column, Rounds, rotated
from bench.serve.load import callers, flood, request
from bench.serve.servers import Server, litellm, orla

ENGINE = "tests.scripted_engine"
DIRECT = "direct"
CHUNKS, CHUNK_S = 200, 0.002
AT_ONCE, STREAMS_AT_ONCE = 32, 8
GOAL_ADDED_MS, GOAL_CPU_MS = 0.9, 0.65
SAMPLES, STREAM_ROUNDS = 10, 5
GROWTH_MIB = 2.0
"""From the third sample on, and between the second round of streams and the last: of what is still called flat."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One arm in one round; times and CPU time in milliseconds, CPU time of the server's process."""

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
    """Measure a server once; a slow one gets a tenth of the requests."""
    count = count if server.name != "LiteLLM" else count // 10
    one, many = await callers(server.url, 1), await callers(server.url, AT_ONCE)
    whole, stream = (request(server.url, server.key, stream=each) for each in (False, True))
    await flood(many, whole, AT_ONCE * 2)  # warm: connections, code
    alone = await flood(one, whole, count // 4)
    before_s, begin_s = server.cpu_s(), time.perf_counter()
    await flood(many, whole, count)
    took_s, cpu_s = time.perf_counter() - begin_s, server.cpu_s() - before_s
    streams = max(count // 50, STREAMS_AT_ONCE)
    before_s = server.cpu_s()
    read = await flood(many[:STREAMS_AT_ONCE], stream, streams, CHUNKS)
    stream_cpu_s = server.cpu_s() - before_s
    for caller in one + many:
        caller.transport.close()
    return Turn(
        server.name, seed, median(each.whole_ms for each in alone), count / took_s, cpu_s / count * 1e3,
        median(each.first_ms for each in read), median(each.whole_ms for each in read), stream_cpu_s / streams * 1e3,
    )  # fmt: skip


def added(turns: Iterable[Turn]) -> list[Turn]:
    """Return the same with what each adds to the direct arm of its round."""
    turns = list(turns)
    direct = {each.seed: each for each in turns if each.arm == DIRECT}
    return [
        replace(
            each,
            added_ms=each.alone_ms - direct[each.seed].alone_ms,
            added_first_ms=each.first_ms - direct[each.seed].first_ms,
        )  # fmt: skip
        for each in turns
    ]


def columns() -> list[Column]:
    """Return the figures of a table."""
    return [
        Column("one caller: median, ms", lambda turn: turn.alone_ms),
        Column("added, ms", lambda turn: turn.added_ms),
        Column(f"{AT_ONCE} callers: requests/s", lambda turn: turn.per_s, ",.0f"),
        Column("CPU per request, ms", lambda turn: turn.cpu_ms),
        Column(f"stream of {CHUNKS}: first part added, ms", lambda turn: turn.added_first_ms),
        Column("whole, ms", lambda turn: turn.stream_ms, ",.0f"),
        Column("CPU per stream, ms", lambda turn: turn.stream_cpu_ms, ",.1f"),
    ]


def beyond_goal(rounds: Rounds[Turn], arm: str) -> list[str]:
    """Return what the gateway is to be, and is not."""
    found = [
        ("adds at the median of one caller", median(rounds.column(arm, lambda turn: turn.added_ms)), GOAL_ADDED_MS),
        ("takes CPU per request", median(rounds.column(arm, lambda turn: turn.cpu_ms)), GOAL_CPU_MS),
    ]
    return [f"the gateway {what}: {ms:.2f} ms, the goal is {goal:.2f}" for what, ms, goal in found if ms > goal]


@contextlib.contextmanager
def standing(servers: Sequence[Server], turn: Server) -> Iterator[None]:
    """Let LiteLLM stand still while another arm has its turn; the core of ``orla-lg serve`` has leases to renew."""
    still = [each.process for each in servers if each.name == "LiteLLM" and each is not turn and each.process]
    for process in still:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in still:
            process.send_signal(signal.SIGCONT)


async def measure(rounds: int, count: int, with_litellm: bool) -> Rounds[Turn]:
    """Run all arms, interleaved."""
    turns = []
    with ExitStack() as stack:
        engine = stack.enter_context(started(ENGINE, "--chunks", str(CHUNKS), "--token-s", str(CHUNK_S)))
        servers = [Server(DIRECT, engine, "", None), stack.enter_context(orla(engine))]
        servers += [stack.enter_context(litellm(engine))] if with_litellm else []
        for seed in range(rounds):
            for server in rotated(servers, seed):
                tell(f"gateway: round {seed + 1}/{rounds}: {server.name}")
                with standing(servers, server):
                    turns.append(await turn(server, seed, count))
        tell(f"gateway: {rounds} rounds", last=True)
    return Rounds(added(turns), [server.name for server in servers])


async def memory(requests: int, streams: int) -> list[str]:
    """Send many requests, then open many streams at once, some rounds of them; return what the server held."""
    slow = ("--chunks", "20", "--token-s", "0.5")
    with started(ENGINE, *slow) as engine, orla(engine) as server:
        whole, stream = (request(server.url, server.key, stream=each) for each in (False, True))
        many, held, step = await callers(server.url, AT_ONCE), [server.rss_mib()], requests // SAMPLES
        for number in range(SAMPLES):
            await flood(many, whole, step)
            held.append(server.rss_mib())
            tell(f"memory: {step * (number + 1):>7,} requests: {held[-1]:.1f} MiB")
        after = [held[-1]]
        for number in range(STREAM_ROUNDS):
            opened = await callers(server.url, streams)
            reading = [asyncio.ensure_future(each.ask(stream, 20)) for each in opened]  # noqa: TID251 - held here
            await asyncio.sleep(5)
            most = server.rss_mib()
            for each in opened[::2]:  # half of them hang up
                each.transport.abort()
            ends = await asyncio.gather(*reading, return_exceptions=True)  # noqa: TID251
            if faults := [end for end in ends[1::2] if isinstance(end, BaseException)]:
                raise faults[0]
            after.append(server.rss_mib())
            tell(f"memory: {streams:,} streams open, {number + 1}/{STREAM_ROUNDS}: {most:.1f} MiB, {after[-1]:.1f} after",
                 last=number + 1 == STREAM_ROUNDS)  # fmt: skip
    return told(held, after, most, requests, streams)


def told(held: Sequence[float], after: Sequence[float], most: float, requests: int, streams: int) -> list[str]:
    """Return what was found of the memory, and whether that is flat."""
    grown, rest = held[-1] - held[2], after[-1] - after[2]
    return [
        f"memory: {held[0]:.0f} MiB at the begin, {held[2]:.1f} after {requests * 2 // SAMPLES:,} requests, "
        f"{held[-1]:.1f} after {requests:,} ({grown:+.1f})",
        f"{streams:,} open streams: {most:.0f} MiB; after {STREAM_ROUNDS} rounds of them {after[-1]:.1f} MiB, "
        f"{rest:+.1f} since the second",
        "flat" if max(grown, rest) <= GROWTH_MIB else f"goal missed: flat is at most {GROWTH_MIB:+.0f} MiB",
    ]
