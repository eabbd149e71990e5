"""What a linked call takes of a real server: CPU of its process, for prompts of more and more messages.

    python -m bench.scale.linked --help

A client speaks the link's protocol over one socket, as a replica does, and does nothing else: the server's process,
on a core of its own, is what is measured. There is no engine's work in it: a call ends as soon as it was granted.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from statistics import median

from bench.lib import flags
from bench.lib.command import finish, parser, tell, usual
from bench.lib.engines import started
from bench.lib.figures import spread, table
from bench.scale.arithmetic import PerCall, calls_per_core
from bench.serve.servers import Server, orla
from orla_lg.link.framing import FrameReader, frame
from orla_lg.link.messages import (
    PATH,
    PROTOCOL,
    UPGRADE,
    End,
    Enter,
    FirstToken,
    Hello,
    Ready,
    Renew,
    Signal,
    flat,
    read,
)

MESSAGES = (4, 10, 60, 200)
IN_FLIGHT, RUNS_CALLS = 64, 4
CHARS = 400


@dataclass(frozen=True, slots=True)
class Block:
    """So many calls of prompts of one length."""

    messages: int
    us: float
    """CPU of the server's process for a call."""


class LinkClient:
    """A replica without an application: so many calls at once, each of a workflow of ``RUNS_CALLS``."""

    def __init__(self, messages: int, calls: int) -> None:
        self._messages, self._left, self._open = messages, calls, 0
        self._dice = random.Random(messages)
        self._system = self._dice.getrandbits(63)
        self._hashes: dict[str, list[int]] = {}
        self._number = 0

    async def run(self, host: str, port: int) -> None:
        """Make all calls."""
        reader, self._writer = await asyncio.open_connection(host, port)
        lines = f"GET {PATH} HTTP/1.1\r\nHost: {host}:{port}\r\nConnection: Upgrade\r\nUpgrade: {UPGRADE}\r\n\r\n"
        self._writer.write(lines.encode())
        await reader.readuntil(b"\r\n\r\n")
        name = f"bench-{self._dice.getrandbits(40):x}"
        self._say(Hello(PROTOCOL, name, host="elsewhere", pid=1), Ready())
        frames, is_welcome = FrameReader(), False
        renewing = asyncio.get_running_loop().create_task(self._renew())
        with contextlib.closing(self._writer):
            while self._left or self._open or not is_welcome:
                data = await reader.read(1 << 16)
                assert data, "the server ended the link"
                for fields in frames.feed(data):
                    message = read(fields)
                    if fields[0] == "Welcome":
                        is_welcome = True
                        for _ in range(IN_FLIGHT):
                            self._next()
                    elif fields[0] == "Grant":
                        assert message is not None
                        self._granted(fields[1])
                    assert fields[0] != "Refused", fields
            renewing.cancel()

    async def _renew(self) -> None:
        number = 0
        while True:
            await asyncio.sleep(0.5)
            number += 1
            self._say(Renew(number))

    def _say(self, *messages: object) -> None:
        self._writer.write(b"".join(frame(flat(message)) for message in messages))  # type: ignore[arg-type]

    def _next(self, run: str | None = None, nth: int = 0) -> None:
        """Make a call: the next one of a run, or the first one of another."""
        if not self._left:
            return
        self._left -= 1
        self._open += 1
        told: list[object] = []
        if run is None:
            self._number += 1
            run = f"run-{self._number}"
            told.append(Signal("run_started", run, {"age_s": 0.0, "thread": None, "graph": ""}))
            self._hashes[run] = [self._system, *(self._dice.getrandbits(63) for _ in range(self._messages - 1))]
        hashes = self._hashes[run]
        told.append(
            Enter(
                f"{run}/{nth}", 0.0, run, run, "answer", nth, "", thread=False, identified=True, model="main",
                stream=True, json_schema=False, tools=False, embeds=False, images=False, may_pass=False,
                hashes=hashes, chars=[CHARS] * len(hashes), answers=list(range(2, len(hashes), 2)),
                prompt_chars=CHARS * len(hashes), tools_chars=0, max_tokens=None, said={}, hints={}, own=None,
                able=None, holds=[], max_attempts=3, timeout_s=None,
            )
        )  # fmt: skip
        self._say(*told)

    def _granted(self, call: str) -> None:
        run, _, nth = call.rpartition("/")
        tokens = CHARS * len(self._hashes[run]) // 4
        self._say(
            FirstToken(call, 1),
            End(call, None, broke=False, prompt_tokens=tokens, cached_tokens=tokens // 2, completion_tokens=16),
        )
        self._open -= 1
        if int(nth) + 1 < RUNS_CALLS:
            self._hashes[run] += [self._dice.getrandbits(63), self._dice.getrandbits(63)]
            self._next(run, int(nth) + 1)
        else:
            self._say(Signal("run_ended", run, {"outcome": "done"}))
            del self._hashes[run]
            self._next()


def block(server: Server, messages: int, calls: int) -> Block:
    host, _, port = server.url.removeprefix("http://").removesuffix("/v1").rpartition(":")
    before_ms = server.cpu_ms()
    asyncio.run(LinkClient(messages, calls).run(host, int(port)))
    return Block(messages, (server.cpu_ms() - before_ms) * 1e3 / calls)


def measure(rounds: int, calls: int, profile: str | None) -> list[Block]:
    found = []
    with ExitStack() as stack:
        engine = stack.enter_context(started("tests.scripted_engine"))
        server = stack.enter_context(orla(engine))
        block(server, 10, calls)
        if profile:
            stack.enter_context(profiled(server, profile))
        for number in range(rounds):
            for messages in MESSAGES:
                tell(f"linked: round {number + 1}/{rounds}: {messages} messages")
                found.append(block(server, messages, calls))
    return found


@contextlib.contextmanager
def profiled(server: Server, where: str) -> Iterator[None]:
    """Have py-spy look at the server meanwhile."""
    program, _, file = where.partition(",")
    assert server.process is not None
    words = [
        program,
        "record",
        "--pid",
        str(server.process.pid),
        "--output",
        file,
        "--format",
        "raw",
        "--rate",
        "500",
    ]
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=sys.stderr)
    try:
        yield
    finally:
        process.send_signal(2)
        process.wait()


def growth_us(blocks: Sequence[Block]) -> float:
    """Return what each further message takes, in microseconds: between the shortest prompts and the longest."""
    middles = {each: median(b.us for b in blocks if b.messages == each) for each in (MESSAGES[0], MESSAGES[-1])}
    return (middles[MESSAGES[-1]] - middles[MESSAGES[0]]) / (MESSAGES[-1] - MESSAGES[0])


def report(blocks: Sequence[Block]) -> list[str]:
    rows = []
    for messages in MESSAGES:
        us = [each.us for each in blocks if each.messages == messages]
        per_core = calls_per_core(PerCall(0.0, median(us)).us, 1.0)
        rows.append([str(messages), spread(us).shown(".0f"), f"{per_core:,.0f}"])
    lines = table(("messages", "CPU of the server, µs a call", "calls/s of one core, all of it"), rows)
    return [*lines, "", f"Each further message takes {growth_us(blocks):.2f} µs."]


def main() -> None:
    found = parser("scale.linked", __doc__)
    usual(found, rounds=5)
    found.add_argument("--calls", type=flags.count, default=4_000, help="of each block (4,000)")
    found.add_argument("--profile", metavar="PY-SPY,FILE", help="a profile of the server while it is measured")
    args: argparse.Namespace = found.parse_args()
    finish(report(measure(args.rounds, args.calls, args.profile)), "scale-out: linked", None)


if __name__ == "__main__":
    main()
