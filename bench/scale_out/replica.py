"""A process of wrapped graphs, with a core in the process and a link to each of several.

A line on its standard input is a block: which core (-1: that in the process), the number of its calls, and their
rate. The answer is a line too: each call's wait for its grant, and its whole time, in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import ExitStack

from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from bench.lib.stub import Way
from bench.overhead.__main__ import Arm
from orla_lg import Backend, Orla
from tests.scripted_engine import MODEL

BOUND = 200
"""More than are ever at once, so that no call waits for another one."""


async def main(engine: str, *servers: str) -> None:
    backend = Backend("main", engine, model=MODEL, engine="openai", max_concurrency=BOUND)
    with ExitStack() as stack:
        local = stack.enter_context(Orla([backend], {"*": "main"}))
        orlas = [*(stack.enter_context(Orla.remote(server)) for server in servers), local]
        model = ChatOpenAI(model=MODEL, base_url=engine, api_key=SecretStr("any"), max_retries=0)
        arms = [Arm(Way(f"{number}", model, orla.wrap)) for number, orla in enumerate(orlas)]
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            number, calls, rate = json.loads(line)
            taken_ms = await arms[number].run("ainvoke", calls, rate)
            wait_ms = [record.queue_wait_s * 1e3 for record in orlas[number].records()[-calls:]]
            print(json.dumps([wait_ms, taken_ms]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
