"""Plain HTTP clients of two gateways, as an application has them: where one gives no answer, the other one is asked.

Each call is a line of JSON when it begins and when it ended, as a replica's is; each request of it has an id of its
own at the engine, so that what is there twice is no client's doing. Its standard input has lines of JSON:
``{"long_s": 8}`` is what the next calls take. It ends with its input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from itertools import count
from typing import Any

import httpx

BACKENDS = {"long": "main", "short": "quick"}
PATIENCE_S = {"long": 120.0, "short": 3.0}
"""How long an answer may take before another gateway is asked. Long calls are never hung up: an engine that notices
late would be at work for them while their place is another call's."""
MOST_S = 150.0
"""Of a call with all its requests."""
TRIES = 60
AVOIDED_S = 5.0
"""For so long a gateway that gave no answer is not asked."""
PAUSE_S = 0.1


def tell(**said: Any) -> None:
    print(json.dumps({**said, "s": time.monotonic()}), flush=True)


class Clients:
    """Callers that never stop asking, in one loop."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self._chosen, self._numbers, self._over = chosen, count(), False
        self._takes_s = {"long": chosen.long_s, "short": chosen.short_s}
        self._urls: list[str] = chosen.gateways.split(",")
        self._first: int = chosen.begins_at
        self._avoided_until_s = [0.0] * len(self._urls)

    async def call(self, http: httpx.AsyncClient, stage: str) -> None:
        """Make a call, by as many requests as it needs, and tell of it."""
        call, takes_s = f"{self._chosen.name}.{next(self._numbers)}", self._takes_s[stage]
        tell(begun=call, stage=stage, takes_s=takes_s)
        end_s, error = time.monotonic() + MOST_S, ""
        for tried in range(TRIES):
            at = self._gateway()
            error = await self._ask(http, stage, f"call-{call}.{tried}-of-{takes_s}- go on", at)
            if not error or time.monotonic() > end_s:
                break
            self._avoided_until_s[at] = time.monotonic() + AVOIDED_S
            await asyncio.sleep(PAUSE_S)
        tell(ended=call, **({"error": error} if error else {}))

    def _gateway(self) -> int:
        """Return the gateway to ask: this process's own, or the one after it while that is avoided."""
        now, many = time.monotonic(), len(self._urls)
        in_order = [(self._first + n) % many for n in range(many)]
        return next((at for at in in_order if self._avoided_until_s[at] <= now), in_order[0])

    async def _ask(self, http: httpx.AsyncClient, stage: str, prompt: str, at: int) -> str:
        """Return why there is no answer; empty: there is."""
        body = {"model": BACKENDS[stage], "messages": [{"role": "user", "content": prompt}], "max_tokens": 16}
        try:
            answer = await http.post(f"{self._urls[at]}/v1/chat/completions", json=body, timeout=PATIENCE_S[stage])
        except httpx.HTTPError as fault:
            return type(fault).__name__
        return "" if answer.status_code == 200 else f"HTTP {answer.status_code}: {answer.text[:200]}"

    async def _ask_on(self, http: httpx.AsyncClient, stage: str) -> None:
        while not self._over:
            await self.call(http, stage)

    async def run(self) -> None:
        """Ask until standard input ends."""
        async with httpx.AsyncClient(trust_env=False) as http, asyncio.TaskGroup() as group:
            for stage in ["long"] * self._chosen.long + ["short"] * self._chosen.short:
                group.create_task(self._ask_on(http, stage))
            while line := await asyncio.to_thread(sys.stdin.readline):
                said = json.loads(line)
                self._takes_s = {stage: said.get(f"{stage}_s", takes_s) for stage, takes_s in self._takes_s.items()}
            self._over = True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("gateways", help="their URLs, with commas between them")
    add("--name", required=True)
    add("--begins-at", type=int, default=0, metavar="N", help="the gateway of this process")
    add("--long", type=int, default=4, help="callers of long calls")
    add("--short", type=int, default=1)
    add("--long-s", type=float, default=2.0)
    add("--short-s", type=float, default=0.3)
    chosen = parser.parse_args()
    tell(ready=chosen.name)
    asyncio.run(Clients(chosen).run())


if __name__ == "__main__":
    main()
