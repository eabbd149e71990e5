"""A process of wrapped graphs, one with a core in the process and one with a link to a server's.

A line on its standard input is a block: the arm, the number of its calls, and their rate. The answer is a line too:
each call's wait for its grant, and its whole time, in milliseconds.
"""

from __future__ import annotations

import asyncio
import json
import sys

from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from bench.lib.stub import Way
from bench.overhead.__main__ import Arm
from bench.serve.link import LINK, LOCAL
from orla_lg import Backend, Orla
from tests.scripted_engine import MODEL

BOUND = 200
"""More than are ever at once, so that no call waits for another one."""


async def main(engine: str, server: str) -> None:
    backend = Backend("main", engine, model=MODEL, engine="openai", max_concurrency=BOUND)
    with Orla([backend], {"*": "main"}) as local, Orla.remote(server) as linked:
        orlas = {LOCAL: local, LINK: linked}
        model = ChatOpenAI(model=MODEL, base_url=engine, api_key=SecretStr("any"), max_retries=0)
        arms = {name: Arm(Way(name, model, orla.wrap)) for name, orla in orlas.items()}
        print("ready", flush=True)
        while line := await asyncio.to_thread(sys.stdin.readline):
            arm, calls, rate = json.loads(line)
            taken_ms = await arms[arm].run("ainvoke", calls, rate)
            wait_ms = [record.queue_wait_s * 1e3 for record in orlas[arm].records()[-calls:]]
            print(json.dumps([wait_ms, taken_ms]), flush=True)


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
