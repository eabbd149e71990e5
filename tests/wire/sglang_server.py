"""A stand-in for SGLang's server, field by field as SGLang 0.5.23 answers; recorded from a real one on a CPU."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.machine import Job, Machine, tokens_of
from tests.wire.served import Events, Handler, Seen, WireServer, event

MODEL = "stand-in"
OPEN = ("/health", "/ready", "/metrics")
ADMIN = {
    "/flush_cache", "/abort_request", "/pause_generation", "/continue_generation", "/release_memory_occupation",
    "/resume_memory_occupation",
}  # fmt: skip
INT64 = 2**63
LEAST = -INT64
"""The priority of a request that has none."""


@dataclass(frozen=True)
class SGLangFlags:
    """How it was started."""

    wires: tuple[str, ...] = ()
    """Beside chat completions; none, as in versions before they came."""
    priority: bool = True
    low_values_first: bool = False
    abort_on_priority: bool = False
    sessions: bool = True
    eviction: str = "lru"
    cache_report: bool = True
    tool_call_parser: str | None = "qwen"
    grammar_backend: str = "xgrammar"
    memory_saver: bool = False
    weights_backup: bool = False
    metrics: bool = True
    api_key: str | None = None
    admin_key: str | None = None
    dp_size: int = 1
    context_length: int = 4096
    vision: bool = False
    auto_truncate: bool = False
    old_paths: bool = False
    """``/get_server_info`` only."""


class SGLangServer(WireServer):
    """SGLang, from outside."""

    def __init__(self, flags: SGLangFlags | None = None, machine: Machine | None = None) -> None:
        super().__init__(machine or Machine(block=1, blocks=16384))
        self.flags = flags or SGLangFlags()
        self.released: list[str] = []
        """Tags of the memory that is released."""
        self.died = False
        """Its scheduler failed an assertion."""
        self._limit = self.machine.limit
        self.restart()

    def restart(self) -> None:
        """Be another incarnation."""
        self.took_s = 30 + secrets.randbelow(10**9) / 1e9
        self.machine.flush()

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        info = "/get_server_info" if self.flags.old_paths else "/server_info"
        gettable: dict[str, Handler] = {
            "/flush_cache": self._flush,
            "/close_session": self._close,
            "/release_memory_occupation": self._release,
            "/resume_memory_occupation": self._resume,
        }
        return {
            **self.asked_for_nothing(*self.flags.wires),
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/tokenize"): self._tokenize,
            ("POST", "/v1/tokenize"): self._tokenize,
            ("GET", info): self._info,
            ("GET", "/get_model_info" if self.flags.old_paths else "/model_info"): self._model_info,
            ("GET", "/v1/loads"): self._loads,
            ("POST", "/abort_request"): self._abort,
            ("POST", "/pause_generation"): self._pause,
            ("POST", "/continue_generation"): self._continue,
            **({("GET", "/metrics"): self._metrics} if self.flags.metrics else {}),
            **{(method, path): handler for path, handler in gettable.items() for method in ("GET", "POST")},
        }

    def refusal(self, seen: Seen) -> Response | None:
        flags = self.flags
        if self.died:
            return Response(status_code=503)
        if seen.path.startswith(OPEN):
            return None
        wanted = (flags.admin_key or flags.api_key) if seen.path in ADMIN else flags.api_key
        return None if wanted is None or seen.key == wanted else JSONResponse({"error": "Unauthorized"}, 401)

    # What it says of itself

    async def _models(self, seen: Seen) -> Response:
        card = {"id": MODEL, "object": "model", "created": int(time.time()), "owned_by": "sglang", "root": MODEL}
        card |= {"parent": None, "max_model_len": self.flags.context_length}
        return JSONResponse({"object": "list", "data": [card]})

    async def _model_info(self, seen: Seen) -> Response:
        vision = self.flags.vision
        told = {
            "model_path": f"/models/{MODEL}", "tokenizer_path": f"/models/{MODEL}", "is_generation": True,
            "has_image_understanding": vision, "has_audio_understanding": False,
        }  # fmt: skip
        return JSONResponse(told)

    async def _info(self, seen: Seen) -> Response:
        flags = self.flags
        told = {
            "enable_priority_scheduling": flags.priority,
            "schedule_low_priority_values_first": flags.low_values_first,
            "abort_on_priority_when_disabled": flags.abort_on_priority,
            "enable_session_radix_cache": flags.sessions,
            "radix_eviction_policy": flags.eviction,
            "allow_auto_truncate": flags.auto_truncate,
            "enable_cache_report": flags.cache_report,
            "tool_call_parser": flags.tool_call_parser,
            "grammar_backend": flags.grammar_backend,
            "enable_memory_saver": flags.memory_saver,
            "enable_weights_cpu_backup": flags.weights_backup,
            "enable_metrics": flags.metrics,
            "api_key": flags.api_key,
            "admin_api_key": flags.admin_key,
            "dp_size": flags.dp_size,
            "random_seed": 42,
            "startup_time": {"load_weight": 1.5, "tokenizer_e2e": self.took_s},
            "max_total_num_tokens": self.machine.capacity_tokens,
            "version": "0.5.23",
        }
        return JSONResponse({**told, "internal_states": [told]})

    async def _loads(self, seen: Seen) -> Response:
        machine, ranks = self.machine, self.flags.dp_size
        used = sum(len(job.tokens) for job in machine.running)
        load = {
            "num_running_reqs": len(machine.running), "num_waiting_reqs": len(machine.waiting),
            "num_used_tokens": used, "max_total_num_tokens": machine.capacity_tokens,
            "token_usage": used / machine.capacity_tokens, "cache_hit_rate": 0.0,
        }  # fmt: skip
        idle = dict.fromkeys(load, 0) | {"max_total_num_tokens": machine.capacity_tokens}
        loads = [{"dp_rank": rank, **(idle if rank else load)} for rank in range(ranks)]
        return JSONResponse({"timestamp": "2026-11-21T13:05:44+00:00", "version": "0.5.23", "loads": loads})

    async def _metrics(self, seen: Seen) -> Response:
        labels = f'{{model_name="{MODEL}"}}'
        lines = [f"sglang:prompt_tokens_total{labels} {float(self.machine.queries)}"]
        lines.append(
            f'sglang:cached_tokens_total{{cache_source="device",model_name="{MODEL}"}} {self.machine.hits}.0'
        )
        return Response("\n".join(lines) + "\n", media_type="text/plain")

    async def _tokenize(self, seen: Seen) -> Response:
        body = seen.body
        tokens = tokens_of(body.get("messages") or [{"role": "", "content": body["prompt"]}], body.get("tools"))
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": 8192})

    # What it can be told

    async def _flush(self, seen: Seen) -> Response:
        if not self.machine.flush():
            return Response("Flush cache failed.\n", 400)
        said = "(When there are running or waiting requests, the operation will not be performed.)"
        return Response(f"Cache flushed.\nPlease check backend logs for more details. {said}\n")

    async def _close(self, seen: Seen) -> Response:
        self.machine.sessions.discard(seen.body["session_id"])
        return Response()  # the same for sessions that nobody opened

    async def _abort(self, seen: Seen) -> Response:
        rid = seen.body.get("rid") or ""
        if any(job.name == rid for job in self._jobs()):  # its front end knows whole ids, its scheduler beginnings
            for job in [job for job in self._jobs() if job.name.startswith(rid)]:
                self.machine.abort(job.name)
        return Response()

    def _jobs(self) -> list[Job]:
        return [*self.machine.running, *(entry[3] for entry in self.machine.waiting)]

    async def _pause(self, seen: Seen) -> Response:
        self._limit, self.machine.limit = self.machine.limit, 0
        for job in self.machine.running:
            job.retracted = seen.body.get("mode") == "retract"
        return JSONResponse({"message": "Generation paused successfully.", "status": "ok"})

    async def _continue(self, seen: Seen) -> Response:
        self.machine.limit = self._limit
        for job in self.machine.running:
            job.retracted = False
        self.machine.wake()
        return JSONResponse({"message": "Generation continued successfully.", "status": "ok"})

    async def _release(self, seen: Seen) -> Response:
        if any(not job.retracted for job in self.machine.running):
            self.died = True  # release_memory_occupation should be called only when server is idle
            return Response(status_code=500)
        self.released = seen.body.get("tags") or ["kv_cache", "weights", "cuda_graph"]
        self.machine.forget()
        return JSONResponse(None)

    async def _resume(self, seen: Seen) -> Response:
        self.released = []
        return JSONResponse(None)

    # Chat completions

    async def _chat(self, seen: Seen) -> Any:
        body = seen.body
        if (refused := self._refused(body)) is not None:
            return refused
        job = Job(body.get("rid") or secrets.token_hex(16), body, allowed=_allowed(body), rank=self._rank(body))
        if self.flags.eviction == "priority":
            job.worth = (LEAST if self.flags.priority else 0) if body.get("priority") is None else body["priority"]
        if self.flags.sessions and body.get("session_id"):
            job.session = body["session_id"]
            self.machine.sessions.add(job.session)
        if body.get("stream"):
            return Events(self._stream(job))
        async with self.machine.turn(job):
            return JSONResponse(await self._whole(job))

    def _rank(self, body: Mapping[str, Any]) -> int:
        if not self.flags.priority:
            return 0
        sign = 1 if self.flags.low_values_first else -1
        told = body.get("priority")
        return -LEAST if told is None else sign * told

    def _refused(self, body: dict[str, Any]) -> Response | None:
        """Return the first objection; another model's name is none."""
        messages, priority, limit = body.get("messages"), body.get("priority"), self.flags.context_length
        if not isinstance(messages, list):
            return _invalid("list_type", "messages", "Input should be a valid list", messages)
        if priority is not None and priority != int(priority):
            why = "Input should be a valid integer, got a number with a fractional part"
            return _invalid("int_from_float", "priority", why, priority)
        if priority is not None and not LEAST <= priority < INT64:
            why = "Unable to parse input string as an integer, exceeded maximum size"
            return _invalid("int_parsing_size", "priority", why, priority)
        if not messages:
            return _error("Messages cannot be empty.", "BadRequestError", 400)
        length = len(tokens_of(messages, body.get("tools")))
        if length > limit:
            why = f"The input ({length} tokens) is longer than the model's context length ({limit} tokens)."
            return _error(why, "BadRequestError", 400)
        if any(job.name == body.get("rid") for job in self._jobs()):
            return _error(f"Duplicate request ID detected: {body['rid']}", "BadRequestError", 400)
        if priority is not None and not self.flags.priority and self.flags.abort_on_priority:
            why = "Using priority is disabled for this server. Please send a new request without a priority."
            return _error(why, "SERVICE_UNAVAILABLE", 503)
        return None

    async def _whole(self, job: Job) -> dict[str, Any]:
        text, function = job.answer()
        made = "".join([piece async for piece in self.machine.pieces(job, text)])
        message: dict[str, Any] = {"role": "assistant", "content": made, "reasoning_content": None}
        if function is not None:
            call = {"id": _call_id(), "index": 0, "type": "function"}
            message |= {"content": "", "tool_calls": [call | {"function": {"name": function, "arguments": made}}]}
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": _reason(job, function),
            "matched_stop": None,
        }  # fmt: skip
        versions = {
            "weight_version": "default",
            "weight_versions": [{"version": "default", "start": 0, "end": job.made}],
        }
        return {**_top(job, "chat.completion"), "choices": [choice], "usage": self._usage(job), "metadata": versions}

    async def _stream(self, job: Job) -> AsyncIterator[str]:
        async with self.machine.turn(job):
            top = _top(job, "chat.completion.chunk")
            yield event({**top, "choices": [_choice({"role": "assistant", "content": ""})]})
            text, function = job.answer()
            if function is not None:
                yield event({**top, "choices": [_choice(_call_delta(_call_id(), function, ""))], "usage": None})
            async for piece in self.machine.pieces(job, text):
                if function is None:
                    yield event({**top, "choices": [_choice({"content": piece})]})
                else:
                    yield event({**top, "choices": [_choice(_call_delta(None, None, piece))], "usage": None})
            yield event({**top, "choices": [_choice({}, finish_reason=_reason(job, function))]})
            if (job.body.get("stream_options") or {}).get("include_usage"):
                yield event({**top, "choices": [], "usage": self._usage(job)})
            yield event("[DONE]")

    def _usage(self, job: Job) -> dict[str, Any]:
        prompt = len(job.tokens)
        return {
            "prompt_tokens": prompt, "total_tokens": prompt + job.made, "completion_tokens": job.made,
            "prompt_tokens_details": {"cached_tokens": job.cached} if self.flags.cache_report else None,
            "reasoning_tokens": 0, "completion_tokens_details": None,
        }  # fmt: skip


def _allowed(body: Mapping[str, Any]) -> int | None:
    allowed: int | None = body.get("max_completion_tokens") or body.get("max_tokens")
    return allowed


def _reason(job: Job, function: str | None) -> str | None:
    return "tool_calls" if function is not None and job.finish == "stop" else job.finish


def _call_id() -> str:
    return f"call_{secrets.token_hex(12)}"


def _call_delta(call_id: str | None, name: str | None, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    return {
        "role": None, "content": None,
        "tool_calls": [{"id": call_id, "index": 0, "type": "function", "function": function}],
    }  # fmt: skip


def _top(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.name, "object": kind, "created": int(time.time()), "model": job.body.get("model", MODEL)}


def _choice(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    delta = {"reasoning_content": None, **delta}
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason, "matched_stop": None}


def _error(message: str, kind: str, status: int) -> Response:
    return JSONResponse({"object": "error", "message": message, "type": kind, "param": None, "code": status}, status)


def _invalid(kind: str, field: str, why: str, value: Any) -> Response:
    found = {"type": kind, "loc": ("body", field), "msg": why, "input": value}
    return _error(f"1 validation error:\n  {found}\n", "Bad Request", 400)
