"""A new engine is a page of code: its adapter, and the conformance suite that proves it.

    python examples/custom_backend.py [http://host:port/v1]

Without a URL, a stand-in for the engine is started. Installed as a package, the adapter is found by name:

    [project.entry-points."orla_lg.backends"]
    pond = "my_package:PondAdapter"              # then: Backend("main", url, engine="pond")
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from typing import Any

from orla_lg import Ask, Backend
from orla_lg.core.backend import Capability, Directions, Effect, Probe, Support
from orla_lg.core.control import Scope, WorkflowCache
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, OpenAIAdapter, advised
from orla_lg.testing.conformance import Report, conform
from orla_lg.testing.faults import FaultEngine, Reply


class PondAdapter(OpenAIAdapter):
    """Pond keeps each conversation in a numbered slot, which can be emptied."""

    async def probe(self) -> Probe:
        plain = await super().probe()  # the models, and what OpenAI's API promises
        props = await self.get(self.root + "props")
        return advised(
            plain,
            capabilities={**PLAIN_CAPABILITIES, Capability.FLUSH_WORKFLOW: Support.NATIVE},
            slots=props["total_slots"],
            version=props["build_info"],
        )

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        fields: dict[str, Any] = {"cache_prompt": not told.fresh}
        return fields if told.slot is None else {**fields, "id_slot": told.slot}

    # KVControl: what it cannot do, it says

    async def flush(self, scope: Scope) -> Effect:
        if not isinstance(scope, WorkflowCache) or scope.slot is None:
            return Effect.UNSUPPORTED
        return await self.effect_of(Effect.FREED, f"{self.root}slots/{scope.slot}?action=erase")

    async def release(self, scope: Scope) -> Effect:
        return Effect.UNSUPPORTED

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        return Effect.UNSUPPORTED


def main(url: str | None = None) -> Report:
    with contextlib.ExitStack() as stack:
        if url is None:
            url = stack.enter_context(FaultEngine(slots=4, otherwise=Reply(token_s=0.002))).url
        report = asyncio.run(conform(PondAdapter(Backend("main", url, engine="pond"))))
    print(report)
    return report


if __name__ == "__main__":
    sys.exit(0 if main(*sys.argv[1:2]).ok else 1)
