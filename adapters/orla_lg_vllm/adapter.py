"""vLLM's server: what can be seen of its flags from outside, and what it can be told.

Facts are from the sources of vLLM 0.32, tried against it on a CPU. Two of them shape this file. Most flags show
only in ``/server_info``, which exists with ``VLLM_SERVER_DEV_MODE=1``; what cannot be seen is tested where a test
costs nothing, else it counts as not given. And the API key guards ``/v1`` and ``/inference`` only.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Backend, Capability, Directions, Effect, Probe, Support, whole
from orla_lg.core.engine.capabilities import EngineStats, KVEvent, Scope, WholeCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, PLAIN_WIRES, OpenAIAdapter, advised
from orla_lg.openai_api.kv_events import kv_events, require
from orla_lg.openai_api.metrics import sample, samples
from orla_lg.openai_api.salt import FIELD, SaltTrial
from orla_lg.wires import chat
from orla_lg_vllm import door

SERVER_INFO_TIMEOUT_S = 30.0
"""The first ``/server_info`` collects the machine's environment, which takes seconds."""

SLEEP_TIMEOUT_S = 600.0
"""Weights are copied to memory and back, after running requests have ended."""

PRIORITY_IGNORED_SINCE = (0, 11)
"""Versions whose only engine is V1, which ignores ``priority`` under another policy; V0 refused the request."""

MAX_PRIORITY = 2**63 - 1
MAX_DIGITS = 15
"""Of a number of tokens."""

MOST_BLOCK_TOKENS = 4096
"""Of a block in the cache; a probing prompt is made twice as long as what the engine says."""

SALTS_SINCE = (0, 9)
"""Versions that find what was cached under a salt by that salt only."""

_DEV_MODE = "the environment variable VLLM_SERVER_DEV_MODE=1 (on a closed network: its routes ask for no key)"
_ADVICE: Mapping[Capability, str] = {
    Capability.TOOLS: "`--enable-auto-tool-choice --tool-call-parser PARSER` would let the model call tools",
    Capability.CACHED_TOKENS: "`--enable-prompt-tokens-details` would let cached tokens be counted",
    Capability.PRIORITY: "`--scheduling-policy priority` would enable priority",
    Capability.FLUSH_ALL: f"{_DEV_MODE} would let the prefix cache be flushed",
    Capability.STATS: "starting it without `--disable-log-stats` would let its load be seen",
    Capability.ABORT: "`--enable-scale-out` would let a request be ended by its id",
    Capability.SLEEP: f"`--enable-sleep-mode` and {_DEV_MODE} would let it sleep",
}
_PRIORITY_UNSEEN = (
    "`--scheduling-policy priority` would enable priority; whether it is set shows only with "
    "VLLM_SERVER_DEV_MODE=1, so priorities are sent all the same: this version ignores what it does not heed"
)
_ONE_PROCESS = "`--api-server-count 1` would let a request be ended by its id: each process knows only its own"

_ABORT_PATHS = ("inference/v1/abort_requests", "abort_requests")
"""The first with ``--enable-scale-out`` (403 without), the second in dev mode, where no ids at all mean everybody."""

_NOBODY = {"request_ids": ["orla-probe"]}
_A_TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@dataclass(frozen=True, slots=True)
class _Shown:
    """What an engine shows of how it was started; in dev mode most, else what its metrics tell."""

    config: Mapping[str, Any]
    """``vllm_config`` of ``/server_info``; empty where it is not shown."""
    metrics: str

    def flag(self, section: str, name: str) -> Any:
        """Return one setting; ``None`` where it is not shown."""
        part = self.config.get(section)
        return part.get(name) if isinstance(part, Mapping) else None

    @property
    def started(self) -> str:
        """Return what differs after a restart; several API processes tell no start time."""
        seconds = sample(self.metrics, "process_start_time_seconds")
        return str(self.config.get("instance_id") or "") if seconds is None else repr(seconds)

    @property
    def one_process(self) -> bool:
        """Whether one process has all requests, so that any of them can be named to it."""
        processes = self.flag("parallel_config", "_api_process_count")
        return sample(self.metrics, "process_start_time_seconds") is not None and processes in (None, 1)

    @property
    def kv_tokens(self) -> int | None:
        """What the KV caches of all its engines hold."""
        each = [_cache_tokens(labels) for labels, _ in samples(self.metrics, "vllm:cache_config_info")]
        return sum(each) or None

    @property
    def vision(self) -> bool | None:
        """Whether the model reads images."""
        model = self.config.get("model_config")
        told = isinstance(model, Mapping) and "multimodal_config" in model
        return self.flag("model_config", "multimodal_config") is not None if told else None

    @property
    def block_tokens(self) -> int:
        """How many tokens are cached or not cached together."""
        sizes = [whole(labels.get("block_size")) for labels, _ in samples(self.metrics, "vllm:cache_config_info")]
        return min(max((size for size in sizes if size), default=16), MOST_BLOCK_TOKENS)


class VLLMAdapter(OpenAIAdapter):
    """Tells vLLM how urgent a call is (its lower number first), and ends calls by name where it may.

    Where the plugin is at work (``door``) calls are labelled, and workflows pinned, released and flushed.
    """

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        require(backend)
        self._sends_priority = False
        self._can_sleep = False
        self._abort_path: str | None = None
        self._plugin = door.Found(False)
        self._counts_cached: tuple[str, bool] | None = None
        """For the incarnation that was asked: whether it counts cached tokens."""
        self._salts = SaltTrial(self)

    async def probe(self) -> Probe:
        """Ask what is shown, and test what is not."""
        plain = await super().probe()
        shown = await self._shown()
        version = str((await self.peek(self.root + "version")).get("version") or "")
        policy = shown.flag("scheduler_config", "policy")
        self._sends_priority = policy == "priority" or (
            policy is None and _release(version) >= PRIORITY_IGNORED_SINCE
        )
        self._can_sleep = bool(shown.flag("model_config", "enable_sleep_mode"))
        self._abort_path = await self._find_abort() if shown.one_process else None
        self._plugin = await door.find(self)
        model = self.backend.model or next(iter(plain.models), "")
        can = {
            Capability.TOOLS: await self._calls_tools(model),
            Capability.CACHED_TOKENS: await self._reports_cached(model, f"{version} {shown.started}", shown),
            Capability.PRIORITY: policy == "priority",
            Capability.FLUSH_ALL: bool(shown.config),
            Capability.STATS: sample(shown.metrics, "vllm:num_requests_running") is not None,
            Capability.ABORT: self._abort_path is not None,
            Capability.SLEEP: self._can_sleep,
        }
        return advised(
            plain,
            capabilities={
                **PLAIN_CAPABILITIES,
                **_supports(can),
                **await self._fixed(shown, model),
                Capability.ISOLATE: await self._salts.support(
                    model,
                    f"{version} {shown.started}",
                    2 * shown.block_tokens,
                    promised=_release(version) >= SALTS_SINCE,
                ),
            },
            kv_tokens=shown.kv_tokens,
            request_tokens=plain.context_tokens,
            vision=shown.vision,
            version=version,
            incarnation=shown.started,
            wires=PLAIN_WIRES | await self.wires.spoken(f"{version} {shown.started}"),
            advice=_advice(shown, policy) | dict.fromkeys(door.ORDERS, self._plugin.advice),
        )

    async def _shown(self) -> _Shown:
        told = await self.peek(self.root + "server_info?config_format=json", timeout_s=SERVER_INFO_TIMEOUT_S)
        config, metrics = told.get("vllm_config"), await self.seen(self.root + "metrics")
        return _Shown(config if isinstance(config, Mapping) else {}, metrics.text if metrics is not None else "")

    async def _fixed(self, shown: _Shown, model: str) -> dict[Capability, Support]:
        """Return what no flag changes, or only the plugin."""
        tokenizes = await self.takes(self.root + "tokenize", {"model": model, "prompt": "a"})
        never = {Capability.SLEEP: Support.UNSUPPORTED} if _on_cpu(shown) else {}
        return {
            **dict.fromkeys(door.ORDERS, Support.NATIVE if self._plugin.works else Support.PLUGIN),
            Capability.TOKENIZE: Support.NATIVE if tokenizes else Support.UNSUPPORTED,
            **never,
        }

    async def _find_abort(self) -> str | None:
        for path in _ABORT_PATHS:
            if await self.takes(self.root + path, _NOBODY):
                return path
        return None

    async def _calls_tools(self, model: str) -> bool:
        # Both ways the request is refused before anything runs: for its tools, or else for its zero tokens.
        body = {**_question(model, "a"), "tools": [_A_TOOL], "max_tokens": 0}
        try:
            await self.ask("POST", "chat/completions", body)
        except EngineRefused as error:
            return "tool-call-parser" not in str(error)
        except BackendUnavailable:
            return False
        return True

    async def _reports_cached(self, model: str, incarnation: str, shown: _Shown) -> bool:
        """Ask for one token, once for each start of the engine, and look whether the count comes.

        Older versions leave it out where it is zero, so the prompt is longer than a block and asked twice.
        """
        known = self._counts_cached
        if known is not None and known[0] == incarnation:
            return known[1]
        body = _question(model, "a " * (2 * shown.block_tokens))
        try:
            told = [await self.post("chat/completions", body) for _ in range(2)]
        except (EngineRefused, BackendUnavailable):
            return False  # not known; the next probe asks again
        counts = any(chat.usage_of(each.get("usage")).cached_tokens is not None for each in told)
        self._counts_cached = (incarnation, counts)
        return counts

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Add the priority (whole, lower first), salt, names for ``abort`` and events, and the plugin's labels."""
        fields: dict[str, Any] = {FIELD: told.cache_salt} if told.cache_salt else {}
        if self._sends_priority and (urgency := round(told.priority)):
            fields["priority"] = max(-MAX_PRIORITY, min(MAX_PRIORITY, -urgency))
        if self._abort_path is not None and told.call_id:
            fields["request_id"] = told.call_id
        if self.backend.kv_events is not None and told.workflow:
            fields["session_id"] = told.workflow
        if self._plugin.works and told.workflow:
            fields["vllm_xargs"] = door.labels(ask, told)
        return fields

    # KVControl: stock vLLM knows one cache for all

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Keep a workflow's cache before all else; the plugin pins half of the pool at most."""
        return await door.order(self, "pin", scope, ttl_s) if self._plugin.works else Effect.UNSUPPORTED

    async def release(self, scope: Scope) -> Effect:
        """Let a workflow's cache be the first to go."""
        return await door.order(self, "release", scope) if self._plugin.works else Effect.UNSUPPORTED

    async def flush(self, scope: Scope) -> Effect:
        """Forget a workflow, which takes the plugin; or everything, which takes that no request holds a block."""
        if self._plugin.works and not isinstance(scope, WholeCache):
            return await door.order(self, "flush", scope)
        if not isinstance(scope, WholeCache):
            return Effect.UNSUPPORTED
        try:
            answer = await self.post(self.root + "reset_prefix_cache")
        except EngineRefused as error:
            return Effect.UNSUPPORTED if error.status in (404, 405) else Effect.FAILED
        except BackendUnavailable:  # older versions answer nothing, whether it was done or not
            return Effect.FAILED
        return Effect.FREED if answer.get("success") is True else Effect.DEFERRED

    # KVEventSource, Observable, Tokenizing, Abortable, Sleepable

    def kv_events(self) -> AsyncGenerator[Sequence[KVEvent]] | None:
        """Listen to what ``--kv-events-config`` publishes, of one engine: with data parallelism, of the first."""
        return kv_events(self.backend)

    async def stats(self) -> EngineStats:
        """Read its metrics, summed over its engines."""
        try:
            text = (await self.ask("GET", self.root + "metrics")).text
        except EngineRefused as error:
            raise BackendUnavailable(str(error)) from error
        shown = _Shown({}, text)
        usage = [value for _, value in samples(text, "vllm:kv_cache_usage_perc")]
        waiting = _whole(sample(text, "vllm:num_requests_waiting"))
        if waiting and self._plugin.works:  # whom the plugin holds back waits for room, and keeps no one waiting
            waiting = max(0, waiting - await door.held_requests(self))
        return EngineStats(
            running=_whole(sample(text, "vllm:num_requests_running")),
            waiting=waiting,
            kv_usage=fmean(usage) if usage else None,
            kv_tokens=shown.kv_tokens,
            prefix_queries=_whole(sample(text, "vllm:prefix_cache_queries")),
            prefix_hits=_whole(sample(text, "vllm:prefix_cache_hits")),
            preemptions=_whole(sample(text, "vllm:num_preemptions")),
        )

    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        """Ask for the tokens of a chat, its template applied."""
        kept = ("model", "messages", "tools", "chat_template", "chat_template_kwargs")
        answer = await self.post(self.root + "tokenize", {key: body[key] for key in kept if key in body})
        return self.tokens_in(answer)

    async def abort(self, call_id: str) -> bool:
        """End a call, by its id on each wire; vLLM makes that out of ours, and answers before it looks for it."""
        if self._abort_path is None or not call_id:
            return False
        return await self.takes(
            self.root + self._abort_path, {"request_ids": [f"chatcmpl-{call_id}", f"resp_{call_id}"]}
        )

    async def sleep(self) -> Effect:
        """Let running requests end, then move the weights out and drop the KV cache."""
        if not self._can_sleep:
            return Effect.UNSUPPORTED
        return await self.effect_of(Effect.FREED, self.root + "sleep?level=1&mode=wait", timeout_s=SLEEP_TIMEOUT_S)

    async def wake(self) -> Effect:
        """Bring the weights back, and believe it when the engine says that it is awake."""
        if not self._can_sleep:
            return Effect.UNSUPPORTED
        effect = await self.effect_of(Effect.RESTORED, self.root + "wake_up", timeout_s=SLEEP_TIMEOUT_S)
        if effect is Effect.RESTORED and (await self.peek(self.root + "is_sleeping")).get("is_sleeping") is not False:
            return Effect.FAILED
        return effect


def _question(model: str, text: str) -> dict[str, Any]:
    return {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 1, "temperature": 0}


def _supports(can: Mapping[Capability, bool]) -> dict[Capability, Support]:
    return {name: Support.NATIVE if works else Support.FLAG for name, works in can.items()}


def _advice(shown: _Shown, policy: Any) -> dict[Capability, str]:
    advice = dict(_ADVICE)
    if policy is None:
        advice[Capability.PRIORITY] = _PRIORITY_UNSEEN
    if not shown.one_process:
        advice[Capability.ABORT] = _ONE_PROCESS
    if _on_cpu(shown):
        del advice[Capability.SLEEP]
    return advice


def _on_cpu(shown: _Shown) -> bool:
    return bool(shown.flag("device_config", "device") == "cpu")  # where vLLM refuses to start with the flag


def _cache_tokens(labels: Mapping[str, str]) -> int:
    """Return what one engine's cache holds; models of mixed layers make it less than all blocks' tokens."""
    if (told := whole(labels.get("kv_cache_size_tokens"))) is not None:
        return told
    size, count = whole(labels.get("block_size")), whole(labels.get("num_gpu_blocks"))
    return size * count if size and count else 0


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d{1,9})\.(\d{1,9})", version)
    return (int(found[1]), int(found[2])) if found else ()


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
