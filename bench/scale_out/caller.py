"""A process that only speaks the link's messages: calls arrive, have their first token and end, so many at a time.

A line on its standard input is a turn: the messages of each prompt, the number of calls, and how many are under way
at a time. The answer is a line too. A workflow makes five calls, each with two messages more than the one before.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from collections.abc import Iterator
from itertools import count
from random import Random
from statistics import median
from typing import cast

from bench.lib.figures import at_rank
from orla_lg.link.dialing import addresses, dial
from orla_lg.link.framing import FrameReader, frame
from orla_lg.link.messages import (
    PROTOCOL,
    RENEW_S,
    Bye,
    End,
    Enter,
    FirstToken,
    Grant,
    Hello,
    Message,
    Ready,
    Refused,
    Renew,
    Signal,
    Welcome,
    flat,
    read,
)  # fmt: skip

FIRST_S, ANSWER_S = 0.002, 0.002
"""From the grant to the first token, and from there to the end: each message arrives by itself."""
TURNS = 5
CHARS, TOKENS = 80, 20
"""Of each message: short, so that all that is under way fits into the engine's cache and nothing waits for it."""


def prompts(messages: int, seed: int) -> Iterator[tuple[int, str, list[int], list[int]]]:
    """Yield turns of workflows: their numbers, the workflow, and the hashes of its prompt, which goes on."""
    dice, system = Random(seed), 11
    for number in count():
        hashes = [system, *(dice.getrandbits(63) for _ in range(messages + TURNS))]
        for turn in range(TURNS):
            length = max(1, messages + 2 * turn - TURNS + 1)
            yield turn, f"w{seed}.{number}", hashes[:length], [CHARS] * length


def enter(call: str, workflow: str, hashes: list[int], chars: list[int], backend: str) -> Enter:
    """Return a call's arrival."""
    answers = list(range(2, len(hashes), 2))
    return Enter(
        call, 0.0, workflow, workflow, "answer", None, "", thread=False, identified=True, model=backend, stream=True,
        json_schema=False, tools=False, embeds=False, images=False, may_pass=False, hashes=hashes, chars=chars,
        answers=answers, prompt_chars=sum(chars), tools_chars=0, max_tokens=None, said={}, hints={}, own=None,
        able=None, holds=(), max_attempts=3, timeout_s=None, layers=(), attempts=0,
    )  # fmt: skip


class Caller(asyncio.Protocol):
    """One link."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.welcome: asyncio.Future[Welcome] = self.loop.create_future()
        self.granted: dict[str, asyncio.Future[Grant]] = {}
        self._reader, self._out, self._number = FrameReader(), bytearray(), 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def send(self, *messages: Message) -> None:
        """Send with what else is sent in this turn of the loop."""
        if not self._out:
            self.loop.call_soon(self._flush)
        for message in messages:
            self._out += frame(flat(message))

    def _flush(self) -> None:
        self._transport.write(bytes(self._out))
        self._out.clear()

    def data_received(self, data: bytes) -> None:
        for fields in self._reader.feed(data):
            message = read(fields)
            if isinstance(message, Grant) and (waits := self.granted.pop(message.call, None)) is not None:
                waits.set_result(message)
            elif isinstance(message, Welcome) and not self.welcome.done():
                self.welcome.set_result(message)
            elif isinstance(message, Refused | Bye):
                raise SystemExit(f"the core says {message}")

    def connection_lost(self, exc: Exception | None) -> None:
        sys.exit(f"the link ended: {exc}")

    def renews(self) -> None:
        """Say that this process is still here, again and again."""
        self._number += 1
        self.send(Renew(self._number))
        self.loop.call_later(RENEW_S, self.renews)

    async def call(self, said: Enter) -> float:
        """Make one call; returns its wait, in milliseconds."""
        waits = self.granted[said.call] = self.loop.create_future()
        begin_s = time.perf_counter()
        self.send(said)
        await waits
        waited_s = time.perf_counter() - begin_s
        await asyncio.sleep(FIRST_S)
        self.send(FirstToken(said.call, 1))
        await asyncio.sleep(ANSWER_S)
        self.send(End(said.call, None, False, len(said.hashes) * TOKENS, None, 16))
        return waited_s * 1e3


async def turn(link: Caller, backend: str, seed: int, messages: int, calls: int, flying: int) -> dict[str, float]:
    """Make so many calls, so many at a time."""
    numbers, waits_ms = iter(range(calls)), list[float]()

    async def one_after_the_other(lane: int) -> None:
        given = prompts(messages, seed * flying + lane)
        for number in numbers:
            turn, workflow, hashes, chars = next(given)
            if not turn:
                link.send(Signal("run_started", workflow))
            waits_ms.append(await link.call(enter(f"{seed}.{number}", workflow, hashes, chars, backend)))
            if turn == TURNS - 1:
                link.send(Signal("run_ended", workflow, {"outcome": "done"}))

    gc.collect()
    begin_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for lane in range(flying):
            group.create_task(one_after_the_other(lane))
    calls_s = calls / (time.perf_counter() - begin_s)
    return {"median_ms": median(waits_ms), "p99_ms": at_rank(waits_ms, 0.99), "calls_s": calls_s}


async def main(server: str) -> None:
    (address,) = addresses(server)
    dialed = dial(address, None, "bench")
    dialed.socket.setblocking(False)
    _, link = await asyncio.get_running_loop().create_connection(Caller, sock=dialed.socket)
    link.send(Hello(PROTOCOL, f"caller-{time.time_ns()}", "bench"))
    if dialed.began:
        link.data_received(dialed.began)
    backend = str((await link.welcome).backends[0]["name"])
    link.send(Ready())
    link.renews()
    print("ready", flush=True)
    for seed in count():
        if not (line := await asyncio.to_thread(sys.stdin.readline)):
            break
        print(json.dumps(await turn(link, backend, seed, *json.loads(line))), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
