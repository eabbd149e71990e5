"""A stand-in for vLLM's server, field by field as vLLM 0.32 answers; recorded from a real one on a CPU."""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.responses import JSONResponse, Response

from tests.wire.machine import Job, Machine, tokens_of
from tests.wire.served import Events, Handler, Seen, WireServer, event

MODEL = "stand-in"
GUARDED = ("/v1", "/v2", "/inference", "/cohere")
INT64 = 2**63
_STARTS = itertools.count(1_795_000_000)


@dataclass(frozen=True)
class VLLMFlags:
    """How it was started."""

    dev_mode: bool = True
    policy: str = "priority"
    prompt_tokens_details: bool = True
    always_details: bool = True
    """Versions before did not tell zero cached tokens."""
    tools: bool = True
    scale_out: bool = False
    api_key: str | None = None
    log_stats: bool = True
    api_servers: int = 1
    engines: int = 1
    sleep_mode: bool = False
    device: str = "cuda"
    version: str = "0.32.0"
    refuses_priority: bool = False
    """As the V0 engine did under another policy."""
    max_model_len: int = 4096
    vision: bool = False
    wires: tuple[str, ...] = ()
    """Beside chat completions; none, as in versions before they came."""
    plugin: str = ""
    """``works``, or why it does not; empty without."""


class VLLMServer(WireServer):
    """vLLM, from outside."""

    def __init__(self, flags: VLLMFlags | None = None, machine: Machine | None = None) -> None:
        super().__init__(machine)
        self.flags = flags or VLLMFlags()
        self.asleep = False
        self.orders: list[tuple[str, dict[str, Any]]] = []
        """What its plugin was told."""
        self.fingerprint = f"vllm-{self.flags.version}-{secrets.token_hex(4)}"
        self.started_s = float(next(_STARTS))

    def restart(self) -> None:
        """Be another incarnation."""
        self.started_s = float(next(_STARTS))
        self.machine.flush()

    def routes(self) -> Mapping[tuple[str, str], Handler]:
        always: dict[tuple[str, str], Handler] = {
            ("GET", "/v1/models"): self._models,
            ("POST", "/v1/chat/completions"): self._chat,
            ("POST", "/tokenize"): self._tokenize,
            ("GET", "/version"): self._version,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/health"): self._nothing,
            ("POST", "/inference/v1/abort_requests"): self._scale_out_abort,
        }
        dev: dict[tuple[str, str], Handler] = {
            ("GET", "/server_info"): self._server_info,
            ("POST", "/reset_prefix_cache"): self._reset,
            ("POST", "/abort_requests"): self._dev_abort,
            ("POST", "/sleep"): self._sleep,
            ("POST", "/wake_up"): self._wake,
            ("GET", "/is_sleeping"): self._is_sleeping,
        }
        plugin: dict[tuple[str, str], Handler] = {
            ("POST", f"/v1/orla/kv/{verb}"): self._plugin_order for verb in ("pin", "release", "flush", "stat")
        }
        dev_mode, plugged = self.flags.dev_mode, bool(self.flags.plugin)
        spoken = self.asked_for_nothing(*self.flags.wires)
        return {**always, **spoken, **(dev if dev_mode else {}), **(plugin if plugged else {})}

    def refusal(self, seen: Seen) -> Response | None:
        key = self.flags.api_key
        if key is not None and seen.path.startswith(GUARDED) and seen.key != key:
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    # What it says of itself

    async def _models(self, seen: Seen) -> Response:
        permission = {
            "id": f"modelperm-{secrets.token_hex(8)}", "object": "model_permission", "created": int(time.time()),
            "allow_create_engine": False, "allow_sampling": True, "allow_logprobs": True,
            "allow_search_indices": False, "allow_view": True, "allow_fine_tuning": False,
            "organization": "*", "group": None, "is_blocking": False,
        }  # fmt: skip
        card = {
            "id": MODEL, "object": "model", "created": int(time.time()), "owned_by": "vllm",
            "root": f"/models/{MODEL}", "parent": None, "max_model_len": self.flags.max_model_len,
            "permission": [permission],
        }  # fmt: skip
        return JSONResponse({"object": "list", "data": [card]})

    async def _version(self, seen: Seen) -> Response:
        return JSONResponse({"version": self.flags.version})

    async def _plugin_order(self, seen: Seen) -> Response:
        """Answer as the plugin does, whose own routes ``tests/vllm_plugin`` tries; no cache is touched here."""
        if self.flags.plugin != "works":
            return JSONResponse({"effect": "unsupported", "reason": self.flags.plugin}, 501)
        verb, order = seen.path.rpartition("/")[2], json.loads(seen.raw)
        self.orders.append((verb, order))
        effect = {"pin": "pinned", "release": "demoted", "flush": "freed", "stat": "stat"}[verb]
        return JSONResponse({"effect": "deferred" if order.get("workflow") == "busy" else effect, "blocks": 0})

    async def _nothing(self, seen: Seen) -> Response:
        return Response()

    async def _server_info(self, seen: Seen) -> Response:
        config: dict[str, Any] = {
            "model_config": {
                "max_model_len": self.flags.max_model_len,
                "enable_sleep_mode": self.flags.sleep_mode,
                "multimodal_config": {"limit_per_prompt": {}} if self.flags.vision else None,
            },
            "cache_config": {"block_size": self.machine.block, "enable_prefix_caching": True},
            "parallel_config": {"_api_process_count": self.flags.api_servers},
            "scheduler_config": {"policy": self.flags.policy, "scheduler_cls": None},
            "device_config": {"device": self.flags.device},
            "kv_transfer_config": None,
            "instance_id": f"{self.started_s:.0f}000000000",
        }
        shown = config if seen.query.get("config_format") == "json" else str(config)
        return JSONResponse({"vllm_config": shown, "vllm_env": {"VLLM_SERVER_DEV_MODE": True}, "system_env": {}})

    async def _metrics(self, seen: Seen) -> Response:
        lines = ["# HELP python_info Python platform information", 'python_info{version="3.11.7"} 1.0']
        if self.flags.api_servers == 1:  # several processes share a registry without their own figures
            lines.append(f"process_start_time_seconds {self.started_s!r}")
        if self.flags.log_stats:
            lines += [line for engine in range(self.flags.engines) for line in self._samples(engine)]
        return Response("\n".join(lines) + "\n", media_type="text/plain; version=1.0.0; charset=utf-8")

    def _samples(self, engine: int) -> list[str]:
        machine, labels = self.machine, f'{{engine="{engine}",model_name="{MODEL}"}}'
        held = sum(-(-len(job.tokens) // machine.block) for job in machine.running)
        share = self.flags.engines
        values = {
            "num_requests_running": len(machine.running) / share,
            "num_requests_waiting": len(machine.waiting) / share,
            "kv_cache_usage_perc": held / machine.blocks,
            "prefix_cache_queries_total": machine.queries / share,
            "prefix_cache_queries_created": self.started_s,
            "prefix_cache_hits_total": machine.hits / share,
            "num_preemptions_total": 0.0,
        }
        cache = {
            "block_size": machine.block, "enable_prefix_caching": "True", "engine": engine,
            "kv_cache_size_tokens": machine.capacity_tokens, "num_gpu_blocks": machine.blocks,
        }  # fmt: skip
        described = ",".join(f'{name}="{value}"' for name, value in cache.items())
        return [
            *(f"vllm:{name}{labels} {float(value)}" for name, value in values.items()),
            f"vllm:cache_config_info{{{described}}} 1.0",
        ]

    async def _tokenize(self, seen: Seen) -> Response:
        body = seen.body
        if body.get("model") not in (None, MODEL):
            return _unknown_model(body["model"])
        messages = body.get("messages") or [{"role": "", "content": body.get("prompt", "")}]
        tokens = tokens_of(messages, body.get("tools"))
        answer = {"count": len(tokens), "max_model_len": self.flags.max_model_len, "tokens": tokens}
        return JSONResponse({**answer, "token_strs": None})

    # What it can be told

    async def _reset(self, seen: Seen) -> Response:
        return JSONResponse({"success": self.machine.flush()})

    async def _scale_out_abort(self, seen: Seen) -> Response:
        if not self.flags.scale_out:
            why = "Scale-out endpoints are disabled. Restart vllm serve with --enable-scale-out to enable them."
            return _error(why, "PermissionDeniedError", 403)
        if (names := seen.body.get("request_ids")) is None:
            return _error("Missing 'request_ids' in request body", "Bad Request", 400)
        for name in names:
            self.machine.abort(name)
        return Response()

    async def _dev_abort(self, seen: Seen) -> Response:
        names = seen.body.get("request_ids") or [job.name for job in self.machine.running]
        for name in names:
            self.machine.abort(name)
        return JSONResponse({"status": "aborted", "aborted": len(names)})

    async def _sleep(self, seen: Seen) -> Response:
        if not self.flags.sleep_mode:
            return _error("Sleep mode is not enabled", "InternalServerError", 500)
        mode, level = seen.query.get("mode", "abort"), int(seen.query.get("level", "1"))
        while self.machine.running:
            if mode == "abort":
                self.machine.running[0].aborted = True
            await asyncio.sleep(self.machine.token_s)
        self.machine.flush()
        self.asleep = True
        return JSONResponse({"status": "sleeping", "level": level})

    async def _wake(self, seen: Seen) -> Response:
        self.asleep = False
        return JSONResponse({"status": "awake", "tags": None})

    async def _is_sleeping(self, seen: Seen) -> Response:
        return JSONResponse({"is_sleeping": self.asleep})

    # Chat completions

    async def _chat(self, seen: Seen) -> Any:
        try:
            body = seen.body
        except ValueError:
            return _invalid("json_invalid", "body.0", "JSON decode error", "<dict of 0 items>")
        if (refused := self._refused(body)) is not None:
            return refused
        rank = body.get("priority", 0) if self.flags.policy == "priority" else 0
        name = f"chatcmpl-{body.get('request_id') or secrets.token_hex(8)}"
        job = Job(name, body, allowed=_allowed(body), rank=rank)
        if body.get("stream"):
            return Events(self._stream(job))
        async with self.machine.turn(job):
            message = await self._message(job)
            return JSONResponse(self._whole(job, message))

    def _refused(self, body: dict[str, Any]) -> Response | None:
        """Return the first objection, in the order in which vLLM looks."""
        priority, allowed, limit = body.get("priority", 0), _allowed(body), self.flags.max_model_len
        if not isinstance(body.get("messages"), list):
            return _invalid("list_type", "body.messages", "Input should be a valid list", body.get("messages"))
        if priority != int(priority):
            why = "Input should be a valid integer, got a number with a fractional part"
            return _invalid("int_from_float", "body.priority", why, priority)
        if not -INT64 <= priority < INT64:
            why = f"Input should be less than or equal to {INT64 - 1}"
            return _invalid("less_than_equal", "body.priority", why, priority)
        if body.get("model") not in (None, MODEL):
            return _unknown_model(body["model"])
        if body.get("tools") and body.get("tool_choice", "auto") == "auto" and not self.flags.tools:
            why = '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set'
            return _error(why, "BadRequestError", 400)
        if allowed is not None and allowed < 1:
            why = f"max_tokens must be at least 1, got {allowed}. (parameter=max_tokens, value={allowed})"
            return _error(why, "BadRequestError", 400, "max_tokens")
        length = len(tokens_of(body["messages"], body.get("tools")))
        if length > limit:
            why = f"This model's maximum context length is {limit} tokens. However, your prompt contains {length}."
            return _error(why, "BadRequestError", 400, "input_tokens")
        if priority and self.flags.refuses_priority:
            return _error(f"Got priority {priority} but Priority scheduling is not enabled.", "BadRequestError", 400)
        return None

    async def _message(self, job: Job) -> dict[str, Any]:
        text, function = job.answer()
        made = "".join([piece async for piece in self.machine.pieces(job, text)])
        empty = dict.fromkeys(("refusal", "annotations", "audio", "function_call", "reasoning"))
        message = {"role": "assistant", "content": made, **empty}
        if function is not None and job.finish == "stop":
            job.finish = "tool_calls"
            call = {"id": _call_id(), "type": "function", "function": {"name": function, "arguments": made}}
            message |= {"content": None, "tool_calls": [call]}
        return message

    def _whole(self, job: Job, message: dict[str, Any]) -> dict[str, Any]:
        choice = {
            "index": 0, "message": message, "logprobs": None, "finish_reason": job.finish, "stop_reason": None,
            "token_ids": None, "routed_experts": None,
        }  # fmt: skip
        usage = {"prompt_tokens_details": None, "completion_tokens_details": None, **self._usage(job)}
        if usage["prompt_tokens_details"]:
            usage["prompt_tokens_details"]["multimodal_tokens"] = None
        rest = ("prompt_logprobs", "prompt_token_ids", "prompt_text", "kv_transfer_params", "ec_transfer_params")
        return {
            **_top(job, "chat.completion"), "choices": [choice], "service_tier": None,
            "system_fingerprint": self.fingerprint, "usage": usage, **dict.fromkeys((*rest, "metrics")),
        }  # fmt: skip

    async def _stream(self, job: Job) -> AsyncIterator[str]:
        wants_usage = (job.body.get("stream_options") or {}).get("include_usage")
        async with self.machine.turn(job):
            top = _top(job, "chat.completion.chunk")
            first = _choice({"role": "assistant", "content": ""})
            yield event({**top, "choices": [first], "prompt_token_ids": None, "prompt_text": None})
            text, function = job.answer()
            if function is not None:
                head = {"id": _call_id(), "type": "function", "index": 0, "function": {"name": function}}
                yield event({**top, "choices": [_choice({"content": None, "tool_calls": [head]}, token_ids=None)]})
            delta: dict[str, Any] = {}
            async for piece in self.machine.pieces(job, text):
                if delta:
                    yield event({**top, "choices": [_choice(delta, token_ids=None)]})
                part = {"index": 0, "function": {"arguments": piece}}
                delta = {"content": piece} if function is None else {"content": None, "tool_calls": [part]}
            if function is not None and job.finish == "stop":
                job.finish = "tool_calls"
            # A bound is met by a token; every other end comes alone.
            if delta and job.finish != "length":
                yield event({**top, "choices": [_choice(delta, token_ids=None)]})
                delta = {}
            last = _choice(delta, finish_reason=job.finish, stop_reason=None, token_ids=None)
            signed = {"system_fingerprint": self.fingerprint}
            yield event({**top, "choices": [last], **({} if wants_usage else signed)})
            if wants_usage:
                yield event({**top, "choices": [], "usage": self._usage(job), **signed})
            yield event("[DONE]")

    def _usage(self, job: Job) -> dict[str, Any]:
        prompt = len(job.tokens)
        counts: dict[str, Any] = {"prompt_tokens": prompt, "total_tokens": prompt + job.made}
        counts["completion_tokens"] = job.made
        if self.flags.prompt_tokens_details and (job.cached or self.flags.always_details):
            counts["prompt_tokens_details"] = {"cached_tokens": job.cached, "created_cache_tokens": job.created}
        return counts


def _allowed(body: Mapping[str, Any]) -> int | None:
    newer = body.get("max_completion_tokens")
    return newer if newer is not None else body.get("max_tokens")


def _call_id() -> str:
    return f"chatcmpl-tool-{secrets.token_hex(8)}"


def _top(job: Job, kind: str) -> dict[str, Any]:
    return {"id": job.name, "object": kind, "created": int(time.time()), "model": job.body.get("model", MODEL)}


def _choice(delta: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None, **more}


def _error(message: str, kind: str, status: int, param: str | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "type": kind, "param": param, "code": status}}, status)


def _invalid(kind: str, where: str, why: str, value: Any) -> Response:
    found = {"type": kind, "loc": where, "msg": why, "input": str(value)}
    return _error(f"1 validation error:\n  {found}", "Bad Request", 400, where)


def _unknown_model(model: str) -> Response:
    return _error(f"The model `{model}` does not exist. Valid aliases: {MODEL}.", "NotFoundError", 404, "model")
