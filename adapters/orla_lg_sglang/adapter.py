"""SGLang's server: it shows all its flags, and a workflow can be a session whose cache goes first once it is closed.

Facts are from the sources of SGLang 0.5.23, tried against it on a CPU (all but sleep, which needs a GPU). It takes
any model's name, any session's id, and orders that do nothing, so what works is decided by the flags it shows.
"""

from __future__ import annotations

import re
import threading
from collections.abc import AsyncGenerator, Mapping, Sequence
from statistics import fmean
from typing import Any, ClassVar

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Backend, Capability, Directions, Effect, Probe, Support, whole
from orla_lg.core.engine.capabilities import EngineStats, KVEvent, Scope, WholeCache, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, PLAIN_WIRES, OpenAIAdapter, advised
from orla_lg.openai_api.kv_events import kv_events, require
from orla_lg.openai_api.metrics import sample
from orla_lg.openai_api.salt import FIELD, SaltTrial

SLEEP_TIMEOUT_S = 600.0
"""Weights are copied to memory and back."""

KEEP_SESSIONS = 20_000
"""Who opened one longer ago is not remembered, so its session stays open."""

MAX_PRIORITY = 2**63 - 1

SALTS_SINCE = (0, 5, 23)
"""The version whose sources were read: earlier ones took salts, and lost them on the way to the cache."""

SALTED_PROMPT_TOKENS = 256
"""Longer than any page of its cache."""

WORTH_LEVELS = 3
"""What a cache is worth has a level below and one above the usual; urgencies are so far apart that none overtakes."""

_ADMIN = "the server's `--admin-api-key` as this backend's admin_key"
_ADMIN_PATHS = (
    "flush_cache", "abort_request", "pause_generation", "continue_generation", "release_memory_occupation",
    "resume_memory_occupation",
)  # fmt: skip
_ADVICE: Mapping[Capability, str] = {
    Capability.JSON_SCHEMA: "`--grammar-backend xgrammar` would let answers follow a JSON schema",
    Capability.TOOLS: "`--tool-call-parser PARSER` would let the model call tools",
    Capability.CACHED_TOKENS: "`--enable-cache-report` would let cached tokens be counted",
    Capability.PRIORITY: "`--enable-priority-scheduling` would enable priority",
    Capability.RELEASE: "`--enable-session-radix-cache` would let a workflow's cache go first once it is released",
    Capability.KEEP: "`--radix-eviction-policy priority` would evict what is of no further use before what is",
    Capability.FLUSH_ALL: f"{_ADMIN} would let the cache be flushed",
    Capability.ABORT: f"{_ADMIN} would let a request be ended by its id",
    Capability.SLEEP: "`--enable-memory-saver --enable-weights-cpu-backup` would let it sleep",
}
_NOBODY = {"rid": "orla-probe"}

_KEPT_FLAGS = (
    "abort_on_priority_when_disabled",
    "enable_memory_saver",
    "enable_priority_scheduling",
    "enable_session_radix_cache",
    "enable_weights_cpu_backup",
    "schedule_low_priority_values_first",
)
"""What is kept of ``/server_info``, which tells the server's keys too."""


class SGLangAdapter(OpenAIAdapter):
    """Tells SGLang how urgent a call is, which session it belongs to, and what its cache will be worth."""

    prefill_only: ClassVar[Mapping[str, Any]] = {"max_tokens": 0}

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        require(backend)
        self._flags: Mapping[str, bool] = {}
        """What it was started with, as of the last probe."""
        self._is_admin = False
        self._evicts_by_priority = False
        self._salts = SaltTrial(self)
        self._sessions = BoundedDict[str, None](KEEP_SESSIONS)
        """Workflows whose sessions may be open: the first request opens one."""
        self._lock = threading.Lock()

    async def probe(self) -> Probe:
        """Ask for its flags, and whether our key opens the routes for administrators."""
        plain = await super().probe()
        flags = await self.peek(self.root + "server_info") or await self.peek(self.root + "get_server_info")
        self._flags = {name: bool(flags.get(name)) for name in _KEPT_FLAGS}
        self._evicts_by_priority = flags.get("radix_eviction_policy") == "priority"
        self._is_admin = await self.takes(self.root + "abort_request", _NOBODY)
        can = {
            Capability.JSON_SCHEMA: flags.get("grammar_backend") != "none",
            Capability.TOOLS: bool(flags.get("tool_call_parser")),
            Capability.CACHED_TOKENS: bool(flags.get("enable_cache_report")),
            Capability.PRIORITY: self._heeds_priority,
            Capability.RELEASE: self._has_sessions,
            Capability.KEEP: self._heeds_worth,
            Capability.FLUSH_ALL: self._is_admin,
            Capability.ABORT: self._is_admin,
            Capability.SLEEP: self._can_sleep,
        }
        return advised(
            plain,
            capabilities={
                **PLAIN_CAPABILITIES,
                **{name: Support.NATIVE if works else Support.FLAG for name, works in can.items()},
                Capability.WARM: Support.NATIVE,
                Capability.ISOLATE: await self._salts.support(
                    self.backend.model or next(iter(plain.models), ""),
                    _started(flags),
                    SALTED_PROMPT_TOKENS,
                    promised=_release(str(flags.get("version") or "")) >= SALTS_SINCE,
                ),
                Capability.STATS: Support.NATIVE if await self._loads() else Support.UNSUPPORTED,
                Capability.TOKENIZE: Support.NATIVE if await self._tokenizes() else Support.UNSUPPORTED,
            },
            kv_tokens=_product(flags.get("max_total_num_tokens"), flags.get("dp_size", 1)),
            request_tokens=None if flags.get("allow_auto_truncate") else plain.context_tokens,
            vision=await self._vision(),
            version=str(flags.get("version") or ""),
            incarnation=_started(flags),
            wires=PLAIN_WIRES | await self.wires.spoken(_started(flags)),
            advice=_ADVICE,
        )

    @property
    def _heeds_priority(self) -> bool:
        return self._flags.get("enable_priority_scheduling", False)

    @property
    def _heeds_worth(self) -> bool:
        refuses = self._flags.get("abort_on_priority_when_disabled", False)
        return self._evicts_by_priority and (self._heeds_priority or not refuses)

    @property
    def _has_sessions(self) -> bool:
        return self._flags.get("enable_session_radix_cache", False)

    @property
    def _can_sleep(self) -> bool:
        return self._is_admin and self._flags.get("enable_memory_saver", False)

    async def _tokenizes(self) -> bool:
        return await self.takes(self.root + "tokenize", {"prompt": "a"})

    async def _vision(self) -> bool | None:
        told = (await self.peek(self.root + "model_info")).get("has_image_understanding")
        return told if isinstance(told, bool) else None

    async def _loads(self) -> list[Mapping[str, Any]]:
        loads = (await self.peek("loads")).get("loads")
        return [each for each in loads if isinstance(each, Mapping)] if isinstance(loads, list) else []

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Add priority, session, salt and id, each only where the engine heeds it.

        A request without a priority is the least urgent of all to SGLang, so zero is told too. Without the flag
        a priority may be refused (``--abort-on-priority-when-disabled``). A call that nobody follows up gets no
        session: what no session holds goes first, as if one had been closed, and nobody has to close it.
        """
        fields: dict[str, Any] = {FIELD: told.cache_salt} if told.cache_salt else {}
        if self._heeds_priority or self._heeds_worth:
            fields["priority"] = max(-MAX_PRIORITY, min(MAX_PRIORITY, self._number(told)))
        if self._has_sessions and told.workflow and told.keep_s != 0:
            with self._lock:
                self._sessions.set(told.workflow, None)
            fields["session_id"] = self._session(told.workflow)
        if self._is_admin and told.call_id:
            fields["rid"] = _request_id(told.call_id)
        return fields

    def _number(self, told: Directions) -> int:
        """Return the one number by which SGLang may order both its queue and its eviction.

        Eviction takes lower numbers first, and a cached prefix keeps the highest that any of its requests had.
        Where both are ordered, urgency decides, and among calls as urgent as each other the worth of their cache.
        """
        sign = -1 if self._flags.get("schedule_low_priority_values_first") else 1
        urgency = sign * round(told.priority) if self._heeds_priority else 0
        return urgency * WORTH_LEVELS + _worth(told) if self._heeds_worth else urgency

    def _session(self, workflow: str) -> str:
        """Return the session's id: two backends at one server each have their own, to be closed on its own."""
        return f"{self.backend.name}/{workflow}"

    def key_for(self, path: str) -> str | None:
        """Return the administrators' key for what only they may order, where the backend has one."""
        is_order = path.startswith(self.root) and path.removeprefix(self.root) in _ADMIN_PATHS
        return (is_order and self.backend.admin_key) or self.backend.api_key

    async def aclose(self) -> None:
        """Close the sessions that are still open: what they hold would outlive all that others cache."""
        with self._lock:
            still_open = list(self._sessions)
        for workflow in still_open:
            await self.release(WorkflowCache(workflow))

    # KVControl: a workflow is a session, which the first request opens

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Say that it cannot be done: all open sessions are kept alike."""
        return Effect.UNSUPPORTED

    async def release(self, scope: Scope) -> Effect:
        """Close the workflow's session: what no open session shares is evicted first, and found until then.

        A workflow without a session is first to go as it is.
        """
        if not (self._has_sessions and isinstance(scope, WorkflowCache)):
            return Effect.UNSUPPORTED
        with self._lock:  # before it is asked: a call that comes meanwhile opens the session again
            if scope.workflow not in self._sessions:
                return Effect.DEMOTED
            self._sessions.pop(scope.workflow)
        order = {"session_id": self._session(scope.workflow)}
        effect = await self.effect_of(Effect.DEMOTED, self.root + "close_session", order)
        if effect is Effect.FAILED:
            with self._lock:
                self._sessions.set(scope.workflow, None)  # for ``aclose`` to try again
        return effect

    async def flush(self, scope: Scope) -> Effect:
        """Forget everything, which SGLang does only when idle; nothing less is possible."""
        if not isinstance(scope, WholeCache):
            return Effect.UNSUPPORTED
        try:
            await self.ask("POST", self.root + "flush_cache")
        except EngineRefused as error:
            busy = error.status == 400
            return Effect.DEFERRED if busy else Effect.UNSUPPORTED if error.status in (401, 403) else Effect.FAILED
        except BackendUnavailable:
            return Effect.FAILED
        return Effect.FREED

    # KVEventSource, Observable, Tokenizing, Abortable, Sleepable

    def kv_events(self) -> AsyncGenerator[Sequence[KVEvent]] | None:
        """Listen to what ``--kv-events-config`` publishes; calls are told apart only where sessions are on."""
        return kv_events(self.backend)

    async def stats(self) -> EngineStats:
        """Read its load, summed over its ranks, and token counts where ``--enable-metrics`` shows them."""
        loads = await self._loads()
        if not loads:
            raise BackendUnavailable(f"backend {self.backend.name!r} at {self.backend.url}: it shows no load")
        seen = await self.seen(self.root + "metrics")
        metrics = seen.text if seen is not None else ""
        return EngineStats(
            running=_sum(loads, "num_running_reqs"),
            waiting=_sum(loads, "num_waiting_reqs"),
            kv_usage=fmean(_share(each.get("token_usage")) for each in loads),
            kv_tokens=_sum(loads, "max_total_num_tokens") or None,
            prefix_queries=_whole(sample(metrics, "sglang:prompt_tokens")),
            prefix_hits=_whole(sample(metrics, "sglang:cached_tokens")),
        )

    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        """Ask for the tokens of a chat, its template applied."""
        kept = {key: body[key] for key in ("model", "messages", "tools", "chat_template_kwargs") if key in body}
        return self.tokens_in(await self.post(self.root + "tokenize", kept))

    async def abort(self, call_id: str) -> bool:
        """End a call's request; SGLang answers the same for ids it does not know."""
        return bool(call_id) and await self.takes(self.root + "abort_request", {"rid": _request_id(call_id)})

    async def sleep(self) -> Effect:
        """Put running requests back into the queue, stop there, and release memory.

        Released while anything runs, SGLang's scheduler fails an assertion and the server ends. Weights come back
        as garbage unless they were copied, so without a copy only the cache is released.
        """
        if not self._can_sleep:
            return Effect.UNSUPPORTED
        if not await self._order("pause_generation", {"mode": "retract"}):
            return Effect.FAILED
        if await self._order("release_memory_occupation", {"tags": self._asleep_tags}):
            return Effect.FREED
        await self._order("continue_generation", {})
        return Effect.FAILED

    async def wake(self) -> Effect:
        """Take the memory again, then go on with the queue."""
        if not self._can_sleep:
            return Effect.UNSUPPORTED
        awake = await self._order("resume_memory_occupation", {"tags": self._asleep_tags})
        return Effect.RESTORED if awake and await self._order("continue_generation", {}) else Effect.FAILED

    @property
    def _asleep_tags(self) -> list[str]:
        return ["kv_cache", "weights"] if self._flags.get("enable_weights_cpu_backup") else ["kv_cache"]

    async def _order(self, path: str, body: Mapping[str, Any]) -> bool:
        return await self.effect_of(Effect.FREED, self.root + path, body, timeout_s=SLEEP_TIMEOUT_S) is Effect.FREED


def _worth(told: Directions) -> int:
    """Return -1 where the cache is of no further use, 1 where it is expected to be, 0 where nobody knows."""
    return 0 if told.keep_s is None else 1 if told.keep_s > 0 else -1


def _request_id(call_id: str) -> str:
    """Return an id that is no other's beginning: SGLang aborts every request whose id begins with the one given."""
    return f"orla-{len(call_id)}-{call_id}"


def _release(version: str) -> tuple[int, ...]:
    found = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    return tuple(int(part) for part in found.groups()) if found else ()


def _started(flags: Mapping[str, Any]) -> str:
    """Return what differs after a restart: how long the start took, to the nanosecond."""
    took = flags.get("startup_time")
    told = took.get("tokenizer_e2e") if isinstance(took, Mapping) else None
    return "" if told is None else str(told)


def _product(tokens: Any, ranks: Any) -> int | None:
    each, times = whole(tokens), whole(ranks)
    return each * times if each and times else None


def _sum(loads: Sequence[Mapping[str, Any]], name: str) -> int:
    return sum(whole(each.get(name)) or 0 for each in loads)


def _share(told: Any) -> float:
    return min(max(float(told), 0.0), 1.0) if isinstance(told, int | float) else 0.0


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
