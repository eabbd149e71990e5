"""The simulated engine as a backend: it can be told everything that an engine can be told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Capability, Directions, Effect, Probe, Support
from orla_lg.core.engine.capabilities import EngineStats, PrefixCache, Scope, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, OpenAIAdapter, advised
from orla_lg.openai_api.metrics import sample, samples

_CAN = (
    Capability.PIN,
    Capability.RELEASE,
    Capability.FLUSH_WORKFLOW,
    Capability.FLUSH_PREFIX,
    Capability.FLUSH_ALL,
    Capability.STATS,
    Capability.TOKENIZE,
    Capability.ABORT,
)
_NAME = "sim:"


class SimAdapter(OpenAIAdapter):
    """Speaks to ``orla-lg sim up``."""

    async def probe(self) -> Probe:
        """Ask what it was started with."""
        plain = await super().probe()
        said = await self.peek(self.root + "version")
        heeded = Support.NATIVE if said.get("priority", True) else Support.FLAG
        metrics = await self.seen(self.root + "metrics")
        shown = metrics.text if metrics is not None else ""
        return advised(
            plain,
            capabilities={**PLAIN_CAPABILITIES, **dict.fromkeys(_CAN, Support.NATIVE), Capability.PRIORITY: heeded},
            kv_tokens=_kv_tokens(shown),
            request_tokens=plain.context_tokens,
            version=str(said.get("version") or ""),
            wires=plain.wires - {"completions", "embeddings"},
            incarnation=str(sample(shown, f"{_NAME}process_start_time_seconds") or ""),
            advice={Capability.PRIORITY: "`priority = true` in its parameters would enable priority"},
        )

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Add whose call it is, how urgent (lower first, as vLLM has it), and its name."""
        fields: dict[str, Any] = {}
        if told.workflow:
            fields["workflow"] = told.workflow
        if urgency := round(told.priority):
            fields["priority"] = -urgency
        if told.call_id:
            fields["request_id"] = told.call_id
        return fields

    # KVControl

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Keep *scope* until nothing else is left to evict."""
        body = self._scoped(scope)
        return await self._order("pin", body if ttl_s is None else {**body, "ttl_s": ttl_s})

    async def release(self, scope: Scope) -> Effect:
        """Evict *scope* next."""
        return await self._order("release", self._scoped(scope))

    async def flush(self, scope: Scope) -> Effect:
        """Forget *scope* now."""
        return await self._order("flush", self._scoped(scope))

    # Observable, Tokenizing, Abortable

    async def stats(self) -> EngineStats:
        """Read its metrics."""
        try:
            text = (await self.ask("GET", self.root + "metrics")).text
        except EngineRefused as error:
            raise BackendUnavailable(str(error)) from error
        whole = {
            field: None if (value := sample(text, _NAME + name)) is None else int(value)
            for field, name in (
                ("running", "num_requests_running"),
                ("waiting", "num_requests_waiting"),
                ("prefix_queries", "prefix_cache_queries"),
                ("prefix_hits", "prefix_cache_hits"),
                ("preemptions", "num_preemptions"),
            )
        }
        return EngineStats(kv_usage=sample(text, f"{_NAME}kv_cache_usage_perc"), kv_tokens=_kv_tokens(text), **whole)

    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        """Ask for the tokens of a chat."""
        return self.tokens_in(await self.post(self.root + "tokenize", body))

    async def abort(self, call_id: str) -> bool:
        """End a call by the name it was sent with."""
        try:
            answer = await self.post("abort", {"request_ids": [call_id]})
        except (EngineRefused, BackendUnavailable):
            return False
        return call_id in (answer.get("aborted") or ())

    # Inside

    def _scoped(self, scope: Scope) -> dict[str, Any]:
        if isinstance(scope, WorkflowCache):
            return {"workflow": scope.workflow}
        if isinstance(scope, PrefixCache):
            return {key: scope.body[key] for key in ("messages", "tools") if key in scope.body}
        return {"all": True}

    async def _order(self, order: str, body: Mapping[str, Any]) -> Effect:
        try:
            answer = await self.post(f"sim/kv/{order}", body)
        except EngineRefused as error:
            return Effect.UNSUPPORTED if error.status in (404, 405) else Effect.FAILED
        except BackendUnavailable:
            return Effect.FAILED
        return Effect(answer.get("effect", Effect.FAILED))


def _kv_tokens(metrics: str) -> int | None:
    for labels, _ in samples(metrics, f"{_NAME}cache_config_info"):
        return int(labels["block_size"]) * int(labels["num_gpu_blocks"])
    return None
