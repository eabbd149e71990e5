"""The fault engine as our own tests like it: takes any model and any length, and caches in slots only.

In a test: ``with StubEngine() as engine: ...``, served by a thread of the test process. Elsewhere:
``python -m tests.stub_engine --port 0`` prints its URL and serves until it is stopped.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Callable, Mapping

from orla_lg.testing.faults import MODEL, OK, Fault, FaultEngine, Gate, Reply, Seen
from orla_lg.testing.faults.exchange import Speaker
from orla_lg.testing.faults.http import text_of

__all__ = ["MODEL", "OK", "Fault", "Gate", "Reply", "Seen", "StubEngine", "text_of"]


class StubEngine(FaultEngine):
    def __init__(
        self,
        *,
        models: tuple[str, ...] = (MODEL,),
        slots: int = 0,
        key: str | None = None,
        rule: Callable[[Seen], Reply | None] | None = None,
        speaks: Mapping[str, Speaker] | None = None,
        port: int = 0,
    ) -> None:
        super().__init__(
            models=models, slots=slots, key=key, rule=rule, speaks=speaks, port=port,
            any_model=True, context_tokens=None, prefix_cache=False,
        )  # fmt: skip


def main() -> None:
    """Serve as a process of its own; prints the URL when ready."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--model", default=MODEL)
    parser.add_argument("--slots", type=int, default=0)
    parser.add_argument("--before-s", type=float, default=0.0, help="seconds before the first byte of an answer")
    parser.add_argument("--token-s", type=float, default=0.0, help="seconds before every chunk of a stream")
    parser.add_argument("--text", default=None, help="what to answer; otherwise it depends on the messages")
    chosen = parser.parse_args()
    reply = Reply(text=chosen.text, before_s=chosen.before_s, token_s=chosen.token_s)
    engine = StubEngine(models=(chosen.model,), slots=chosen.slots, rule=lambda seen: reply, port=chosen.port)
    engine.keep_log = False
    asyncio.run(_serve_forever(engine))


async def _serve_forever(engine: StubEngine) -> None:
    await engine.serve()
    print(engine.url, flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
