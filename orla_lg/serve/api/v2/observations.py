"""What v2's clients ask of past calls: completions, feedback, figures and costs by stage, and kept requests."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orla_lg.core.serving import Serving
from orla_lg.errors import RecordUnknown
from orla_lg.serve.access.access import Caller
from orla_lg.serve.api.v2.errors import answering_errors, wrong
from orla_lg.serve.api.v2.reading import body_of, given, limit, since
from orla_lg.serve.http.guard import CALLER
from orla_lg.serve.past_calls.captures import CaptureBook, Captured
from orla_lg.serve.past_calls.completions import Completion, CompletionBook, Feedback, figures
from orla_lg.serve.past_calls.moments import rfc3339
from orla_lg.serve.posted.items import Name, read_fields

FEEDBACK = "/v1/feedback"
STAGE = "/api/v1/stages/{name:path}"


class FeedbackBody(BaseModel):
    """What is said of a call."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    completion_id: Name
    stage_id: Name
    workflow_run: Name | None = None
    rating: float | None = Field(None, ge=0, le=1)
    labels: tuple[Name, ...] = Field((), max_length=100)
    notes: str = Field("", max_length=10_000)


class Observations:
    """The routes of past calls.

    Args:
        serving: The core.
        book: What is remembered.
        captures: What is kept of requests; ``None``: nothing.
        clock: Seconds since 1970.
    """

    def __init__(self, serving: Serving, book: CompletionBook, captures: CaptureBook | None) -> None:
        self._serving, self._book, self._captures = serving, book, captures

    def routes(self) -> list[Route]:
        """Return them."""
        taken = {
            f"{STAGE}/completions": self.completions,
            f"{STAGE}/feedback": self.feedback,
            f"{STAGE}/metrics": self.metrics,
            "/api/v1/costs": self.costs,
            "/api/v1/workflows/{run:path}/completions": self.kept,
        }
        routes = [Route(path, answering_errors(handler), methods=["GET"]) for path, handler in taken.items()]
        return [*routes, Route(FEEDBACK, answering_errors(self.say), methods=["POST"])]

    async def completions(self, request: Request) -> Response:
        """List a stage's completions, the newest first."""
        most, found = limit(request), list[dict[str, Any]]()
        for each in self._book.completions(stage=request.path_params["name"], since_s=since(request)):
            if len(found) == most:
                break
            found.append(shown(each))
        return JSONResponse({"completions": found})

    async def feedback(self, request: Request) -> Response:
        """List what was said of a stage's calls, the newest first."""
        most, found = limit(request), list[dict[str, Any]]()
        for each in self._book.feedback(request.path_params["name"], since(request)):
            if len(found) == most:
                break
            found.append(said(each))
        return JSONResponse({"feedback": found})

    async def metrics(self, request: Request) -> Response:
        """Sum up a stage's calls on each backend."""
        found = figures(self._book.completions(stage=request.path_params["name"], since_s=since(request)))
        rows = [
            {
                "backend": each.backend, "count": each.count, "avg_latency_ms": each.mean_s * 1000,
                "p50_latency_ms": each.p50_s * 1000, "p95_latency_ms": each.p95_s * 1000,
                "total_cost_usd": each.cost_usd, "error_count": each.errors,
            }
            for each in found
        ]  # fmt: skip
        return JSONResponse({"metrics": rows})

    async def costs(self, request: Request) -> Response:
        """Sum up what calls cost by the variant of the mapping; those of none are under an empty name."""
        sums: dict[str, tuple[int, float]] = {}
        for each in self._book.completions(since_s=since(request)):
            count, usd = sums.get(each.mapping, (0, 0.0))
            sums[each.mapping] = count + 1, usd + (each.cost_usd or 0.0)
        rows = [
            {"mapping": mapping, "count": count, "total_cost_usd": usd}
            for mapping, (count, usd) in sorted(sums.items())
        ]
        return JSONResponse({"costs": rows})

    async def kept(self, request: Request) -> Response:
        """List the kept requests and answers of a workflow, the oldest first."""
        if self._captures is None:
            raise wrong("this server keeps no requests and answers; [serve] keep_prompts = true allows it")
        rows = [captured(each) for each in self._captures.of(request.path_params["run"])]
        return JSONResponse({"completions": rows})

    async def say(self, request: Request) -> Response:
        """Note what is said of a call, and let mappers learn it."""
        sent = given(await body_of(request), FeedbackBody.model_fields)
        for name in ("completion_id", "stage_id"):
            if not sent.get(name):
                raise wrong(f"{name} is required")
        heard = read_fields(FeedbackBody, sent)
        caller: Caller = request.scope[CALLER]
        caller.check_stage(heard.stage_id)
        self._book.said(
            Feedback(
                heard.completion_id, heard.stage_id, heard.workflow_run, heard.rating, heard.labels, heard.notes,
                self._book.now(),
            )
        )  # fmt: skip
        if heard.rating is not None and self._may_rate(caller, heard.completion_id):
            self._serving.feedback(heard.completion_id, heard.rating)
        return JSONResponse({"status": "accepted"}, 202)

    def _may_rate(self, caller: Caller, completion: str) -> bool:
        """Whether a call is known, and of a tenant that the caller speaks for."""
        try:
            tenant = self._serving.records.find(completion).tenant
        except RecordUnknown:
            return False
        return caller.tenants is None or (tenant in caller.tenants if tenant else not caller.tenants)


def shown(completion: Completion) -> dict[str, Any]:
    """Return a completion as v2 writes it, and what else is known of it."""
    return {
        "completion_id": completion.id, "stage_id": completion.stage, "workflow_run": completion.workflow,
        "backend": completion.backend, "status": "success" if completion.error is None else "error",
        "prompt_tokens": completion.prompt_tokens, "completion_tokens": completion.completion_tokens,
        "usage": dict(completion.usage), "tool_kind": completion.tool_kind,
        "latency_ms": round(completion.latency_s * 1000), "cost_usd": completion.cost_usd,
        "tags": dict(completion.tags), "mapping": completion.mapping, "created_at": rfc3339(completion.ended_s),
        "cached_tokens": completion.cached_tokens, "queue_wait_ms": completion.queue_wait_s * 1000,
        "ttft_ms": None if completion.ttft_s is None else completion.ttft_s * 1000, "error": completion.error,
        "tenant": completion.tenant,
    }  # fmt: skip


def said(feedback: Feedback) -> dict[str, Any]:
    """Return what was said of a call as v2 writes it."""
    return {
        "completion_id": feedback.completion, "stage_id": feedback.stage, "workflow_run": feedback.workflow,
        "rating": feedback.rating, "labels": list(feedback.labels), "notes": feedback.notes,
        "created_at": rfc3339(feedback.at_s),
    }  # fmt: skip


def captured(kept: Captured) -> dict[str, Any]:
    """Return a kept request and its answer."""
    return {
        "completion_id": kept.completion, "stage_id": kept.stage, "workflow_run": kept.workflow,
        "tenant": kept.tenant, "backend": kept.backend, "request": kept.asked(), "response": kept.answered(),
        "truncated": kept.is_cut, "created_at": rfc3339(kept.at_s),
    }  # fmt: skip
