"""The inside of an engine, as far as its wire lets one see it: turns, a cache of blocks, tokens that take time."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from tests.wire.answers import answer_to, text_of


def tokens_of(messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """Return a token for each word and each role, the tools first."""
    words = json.dumps(tools).split() if tools else []
    for message in messages:
        words += [f"<{message.get('role')}>", *text_of(message).split()]
    return [zlib.crc32(word.encode()) % 50_000 for word in words]


@dataclass(eq=False)
class Job:
    """One request inside the engine."""

    name: str
    body: dict[str, Any] = field(repr=False)
    allowed: int | None = None
    """Tokens that the answer may have; ``None`` leaves the end to the model."""
    rank: int = 0
    """Lower runs first."""
    session: str = ""
    worth: int = 0
    """Blocks of lower worth are evicted first; a block has the highest of its jobs'."""
    tokens: list[int] = field(default_factory=list, repr=False)
    cached: int = 0
    created: int = 0
    """Tokens of the blocks that its prompt added to the cache."""
    made: int = 0
    """Tokens of the answer so far."""
    finish: str | None = None
    aborted: bool = False
    retracted: bool = False
    """Put back, to go on later; it holds no block."""

    def __post_init__(self) -> None:
        self.tokens = self.tokens or tokens_of(self.body["messages"], self.body.get("tools"))

    @property
    def label(self) -> str:
        """The text of the last message, by which a test knows its request."""
        return text_of(self.body["messages"][-1])

    def answer(self) -> tuple[str, str | None]:
        """Return the answer's text, and the function's name if it is the arguments of a call."""
        return answer_to(self.body, self.allowed)


class Machine:
    """Takes turns by rank, then by arrival, and remembers prompts by blocks.

    Args:
        running: Requests at a time.
        block: Tokens that are cached together.
        blocks: How many blocks there are.
        token_s: Seconds for each token.
    """

    def __init__(self, *, running: int = 8, block: int = 16, blocks: int = 1024, token_s: float = 0.001) -> None:
        self.limit, self.block, self.blocks, self.token_s = running, block, blocks, token_s
        self.salted = True
        """Prompts are found under the ``cache_salt`` that they came with; versions before lost it on the way."""
        self.running: list[Job] = []
        self.waiting: list[tuple[int, int, asyncio.Future[None], Job]] = []
        self.started: list[str] = []
        """Labels, in the order in which their turns came."""
        self.ended: list[str] = []
        """Labels, in the order in which their turns ended, however they did."""
        self.queries = self.hits = 0
        self.sessions: set[str] = set()
        """Open ones: what they hold is evicted after all else."""
        self._cache: dict[int, set[str]] = {}
        """Sessions of each block; the least recently used block first."""
        self._worth: dict[int, int] = {}
        """Of each block."""
        self._numbers = itertools.count()

    # Waiters

    @asynccontextmanager
    async def turn(self, job: Job) -> AsyncIterator[Job]:
        """Wait for a place, then look the prompt up and keep it."""
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        entry = (job.rank, next(self._numbers), place, job)
        heapq.heappush(self.waiting, entry)
        self.wake()
        try:
            await place
            self.started.append(job.label)
            self._look_up(job)
            yield job
        finally:
            if job in self.running:
                self.running.remove(job)
                self.ended.append(job.label)
            else:
                self.waiting.remove(entry)
                heapq.heapify(self.waiting)
            self.wake()

    def wake(self) -> None:
        """Give free places to whoever is next."""
        while self.waiting and len(self.running) < self.limit:
            _, _, place, job = heapq.heappop(self.waiting)
            self.running.append(job)
            if not place.done():
                place.set_result(None)

    def abort(self, name: str) -> int:
        """End the requests of that name; returns how many there were."""
        found = [job for job in self.running if job.name == name]
        for entry in [entry for entry in self.waiting if entry[3].name == name]:
            self.waiting.remove(entry)
            self.running.append(entry[3])
            entry[2].set_result(None)
            found.append(entry[3])
        for job in found:
            job.aborted = True
        heapq.heapify(self.waiting)
        return len(found)

    async def pieces(self, job: Job, text: str) -> AsyncIterator[str]:
        """Yield the text's words, each after its time, until the end, the bound or an abort."""
        words = text.split(" ")
        for at, word in enumerate(words):
            if job.aborted or (job.allowed is not None and job.made >= job.allowed):
                break
            await asyncio.sleep(self.token_s)
            while job.retracted:
                await asyncio.sleep(self.token_s)
            job.made += 1
            yield word if at == 0 else f" {word}"
        cut = job.allowed is not None and job.made >= job.allowed
        job.finish = "abort" if job.aborted else "length" if cut else "stop"

    # The cache

    def _look_up(self, job: Job) -> None:
        chain = self._chain(job.tokens, job.body.get("cache_salt") if self.salted else None)
        found = len(list(itertools.takewhile(self._cache.__contains__, chain)))
        # The last token is always computed, for the answer begins with it.
        job.cached = min(found * self.block, (len(job.tokens) - 1) // self.block * self.block)
        job.created = (len(chain) - found) * self.block
        self.queries += len(job.tokens)
        self.hits += job.cached
        for key in reversed(chain):  # the end of a prompt is older than its beginning: it goes first
            self._cache[key] = self._cache.pop(key, set()) | ({job.session} if job.session else set())
            self._worth[key] = max(self._worth.get(key, job.worth), job.worth)
        surplus = len(self._cache) - self.blocks
        first = heapq.nsmallest(
            surplus, self._cache, lambda key: (len(self._cache[key] & self.sessions), self._worth[key])
        )
        for key in first:
            del self._cache[key], self._worth[key]

    def _chain(self, tokens: list[int], salt: str | None = None) -> list[int]:
        chain, chained = [], hash(salt) if salt else 0
        for start in range(0, len(tokens) - self.block + 1, self.block):
            chained = hash((chained, *tokens[start : start + self.block]))
            chain.append(chained)
        return chain

    @property
    def capacity_tokens(self) -> int:
        """What the cache holds."""
        return self.block * self.blocks

    def flush(self) -> bool:
        """Forget everything, unless somebody needs it."""
        if self.running or self.waiting:
            return False
        self.forget()
        return True

    def forget(self) -> None:
        """Forget everything, needed or not."""
        self._cache.clear()
        self._worth.clear()
