"""The scripted engine: it decodes and prefills at a pace, calls the tools that a prompt plans, and caches prefixes.

Its URL names the pace and a cache, ``/TOKENS_S/PREFILL_S/NAME/v1``. A token is four characters. Requests do not slow
each other down. One that hangs up leaves in the cache what was prefilled until then. The final answer begins with the
moment of its first token, by ``time.monotonic``, so that a caller that does not stream knows it too.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import uvloop

from bench.tools.law import Pace, filled
from tests.scripted_engine import DONE, HEAD, SHOWN, STREAM, Account, Connection, answered, event

TOOL = "look_up"
PLAN = re.compile(r"\[plan (\d+): ([\d,]+); (\d+), (\d+)\]")
KEPT = 8
"""Requests whose prompts are in a cache."""
Delta = dict[str, Any]


class Planned:
    """What a request's answer is to be; *number* is empty where its prompt plans none."""

    def __init__(self, body: Mapping[str, Any]) -> None:
        self.prompt = "".join(map(rendered, body["messages"]))
        found = PLAN.search(self.prompt[:4000])
        self.number, calls, call_tokens, final_tokens = found.groups() if found else ("", "0", "1", "1")
        self.round = sum(1 for message in body["messages"] if message.get("tool_calls"))
        bounds = (body.get(name) for name in ("max_completion_tokens", "max_tokens"))
        self.is_call = bool(found) and not any(most is not None and most <= 1 for most in bounds)
        """Whether the graph asks: neither a probe nor a prefill, which are answered with a token."""
        plan = [*map(int, calls.split(","))]
        self.calls = plan[self.round] if self.is_call and self.round < len(plan) else 0
        self.is_final = self.is_call and not self.calls
        self._call_tokens = int(call_tokens)
        self.tokens = self.calls * self._call_tokens or (int(final_tokens) if self.is_final else 1)
        self.finish = "tool_calls" if self.calls else "stop"

    def message(self) -> Delta:
        """Return the answer; the final one begins with the moment at which this is called."""
        if not self.calls:
            first = f"{time.monotonic():.6f} " if self.is_final else "word "
            return {"role": "assistant", "content": first + "word " * (self.tokens - 1)}
        functions = ({"name": TOOL, "arguments": text} for text in self._arguments())
        calls = [
            {"id": f"call-{self.round}-{n}", "type": "function", "function": each} for n, each in enumerate(functions)
        ]
        return {"role": "assistant", "content": None, "tool_calls": calls}

    def _arguments(self) -> Iterator[str]:
        """Yield each call's: which call it is, and words; as ``json.dumps`` writes it, and so LangChain."""
        bare = len(json.dumps({"q": ""}))
        for index in range(self.calls):
            yield json.dumps({"q": filled(f"{self.number}.{self.round}.{index} ", self._call_tokens)[:-bare]})


def deltas(message: Delta) -> list[Delta]:
    """Return an answer as a stream has it, a token each."""
    if message["content"]:
        return [{"content": f"{word} "} for word in message["content"].split()]
    made = list[Delta]()
    for index, call in enumerate(message["tool_calls"]):
        text = call["function"]["arguments"]
        parts: list[Delta] = [{"function": {"arguments": text[at : at + 4]}} for at in range(0, len(text), 4)]
        parts[0] = {**call, "function": {"name": TOOL, **parts[0]["function"]}}
        made += [{"tool_calls": [{"index": index, **part}]} for part in parts]
    return made


def rendered(message: Mapping[str, Any]) -> str:
    """Return a message as the prompt has it."""
    calls = (call["function"]["arguments"] for call in message.get("tool_calls") or ())
    return "".join((str(message.get("content") or ""), *calls))


def common(prompt: str, other: str) -> int:
    """Return how many characters two prompts begin with in common."""
    low, high = 0, min(len(prompt), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if prompt[low:middle] == other[low:middle] else (low, middle - 1)
    return low


class Paced(Connection):
    """One connection of the scripted engine."""

    caches: dict[bytes, OrderedDict[str, list[str]]] = {}  # noqa: RUF012, the process's
    _prefilling = False

    def _answer(self, target: bytes) -> None:
        self._path = target.partition(b"/v1")[0]
        super()._answer(target)

    def _begin(self) -> None:
        self._pace = Pace(*map(float, self._path.split(b"/")[1:3]))
        planned = self._planned = Planned(json.loads(self._body))
        cache = self.caches.setdefault(self._path, OrderedDict())
        self._kept = cache.setdefault(planned.number, [])
        if len(cache) > KEPT:
            cache.popitem(last=False)
        self._found = max((common(planned.prompt, each) for each in self._kept), default=0)
        self._came_s, self._prefilling = self._loop.time(), True
        self._since_s = self._came_s + (len(planned.prompt) - self._found) / 4 / self._pace.prefill_s
        self._account.running += 1
        self._timer = self._loop.call_at(self._since_s, self._decode)

    def _decode(self) -> None:
        planned, self._prefilling = self._planned, False
        self._kept.append(planned.prompt)
        self._message = planned.message()
        if STREAM.search(self._body):
            self.transport.write(HEAD)
            self._token(0, deltas(self._message))
        else:
            self._timer = self._loop.call_at(self._at_s(planned.tokens - 1), self._end)

    def _at_s(self, token: int) -> float:
        return self._since_s + token / self._pace.tokens_s

    def _token(self, number: int, answer: Sequence[Delta]) -> None:
        first = {} if number else {"role": "assistant"}
        self.transport.write(event([{"index": 0, "delta": first | answer[number], "finish_reason": None}]))
        if number + 1 < len(answer):
            self._timer = self._loop.call_at(self._at_s(number + 1), self._token, number + 1, answer)
            return
        last = event([{"index": 0, "delta": {}, "finish_reason": self._planned.finish}])
        self._answered(last + event([], usage=self._usage()) + DONE)

    def _end(self) -> None:
        choice = {"index": 0, "message": self._message, "finish_reason": self._planned.finish}
        body = {**SHOWN, "object": "chat.completion", "choices": [choice], "usage": self._usage()}
        self._answered(answered(json.dumps(body).encode()))

    def _answered(self, rest: bytes) -> None:
        self._over()
        self._kept.append(self._planned.prompt + rendered(self._message))
        self.transport.write(rest)

    def _usage(self) -> dict[str, Any]:
        prompt, answer = len(self._planned.prompt) // 4, self._planned.tokens
        counted = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        return counted | {"prompt_tokens_details": {"cached_tokens": min(self._found // 4, prompt - 1)}}

    def _over(self) -> None:
        self._timer = None
        self._account.running -= 1

    def connection_lost(self, exc: Exception | None) -> None:
        """Keep what was prefilled until now."""
        if self._prefilling and self._timer is not None:
            done = (self._loop.time() - self._came_s) * self._pace.prefill_s
            self._kept.append(self._planned.prompt[: self._found + int(4 * done)])
        super().connection_lost(exc)


async def main() -> None:
    """Serve on a free port until the process is ended."""
    account, chosen = Account(), argparse.Namespace(late_s=0.0)
    server = await asyncio.get_running_loop().create_server(lambda: Paced(account, chosen), "127.0.0.1", 0)
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
