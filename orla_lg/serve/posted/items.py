"""What can be posted: the kinds, and which fields each has. A field that is not known is refused, not passed over."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, JsonValue, ValidationError, model_validator

from orla_lg.core.engine.backend import MOST_CALLS
from orla_lg.errors import ConfigError, did_you_mean, shown

MOST_CHARS = 200
"""Of a name."""

MOST_PROMPT_CHARS = 200_000
MOST_NAMED = 1000
"""Of names in one item: its overrides, edges, rates."""

MOST_HOOK_MS = 10_000
"""So long an outside service may be asked at most."""

HOOK_MS, REFRESH_MS = 50, 60_000


class PostedKind(StrEnum):
    """What is posted."""

    BACKEND = "backends"
    STAGE = "stages"
    MAPPING = "mappings"
    POLICY = "policies"
    SKILL = "skills"
    WORKFLOW = "workflows"
    SETTING = "settings"


def _printable(said: str) -> str:
    if not said.isprintable() or said != said.strip():
        raise ValueError("it must be printable, and neither begin nor end with a space")
    return said


Name = Annotated[str, Field(min_length=1, max_length=MOST_CHARS), AfterValidator(_printable)]
Text = Annotated[str, Field(max_length=MOST_CHARS), AfterValidator(_printable)]
Names = Annotated[tuple[Name, ...], Field(max_length=MOST_NAMED)]
Price = Annotated[float, Field(ge=0, allow_inf_nan=False)]


class PostedItem(BaseModel):
    """One of them."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    kind_: ClassVar[PostedKind]
    named_by: ClassVar[str] = "name"
    """The field that is its name."""

    @property
    def key(self) -> str:
        """Its name."""
        return str(getattr(self, self.named_by))

    def changed(self, **given: Any) -> Self:
        """Return it with other values, checked like a new one.

        Raises:
            ConfigError: One cannot be.
        """
        return read_item(type(self), {**self.model_dump(mode="json", exclude_unset=True), **given})


class PostedBackend(PostedItem):
    """A backend, as Orla's APIs write it: an engine, or a tool behind HTTP."""

    kind_: ClassVar[PostedKind] = PostedKind.BACKEND
    name: Name
    endpoint: Annotated[str, Field(min_length=1, max_length=2000)]
    kind: Literal["llm", "tool"] = "llm"
    type: Text = ""
    """The engine, as v1 names it: ``openai``, ``sglang``, or an adapter of ours; empty: an OpenAI-compatible one."""
    model_id: Text = ""
    api_key_env_var: Text = ""
    """The variable that holds the key; which may be named is said in ``[serve] posted_key_envs``."""
    max_concurrency: int | None = Field(None, ge=1, le=MOST_CALLS)
    queue_capacity: int | None = Field(None, ge=0, le=MOST_CALLS)
    quality: float | None = Field(None, ge=0, le=1)
    rate_per_second: Price | None = None
    input_cost_per_mtoken: Price | None = None
    output_cost_per_mtoken: Price | None = None
    cache_read_cost_per_mtoken: Price | None = None
    cost_source: Annotated[str, Field(max_length=2000)] = ""
    tool_kind: Text = ""
    rates: Annotated[dict[Name, Price], Field(max_length=MOST_NAMED)] = {}

    @model_validator(mode="after")
    def _of_its_kind(self) -> Self:
        if self.name in ("*", "auto"):
            raise ValueError("a backend needs a name other than '*' and 'auto'")
        if self.kind == "llm":
            wrong = [each for each in ("rates", "tool_kind") if getattr(self, each)]
            if wrong:
                raise ValueError(f"{wrong[0]} is only valid for kind=tool")
        else:
            if not self.tool_kind:
                raise ValueError("tool_kind is required for kind=tool")
            for each in ("cost_source", "cache_read_cost_per_mtoken", "type"):
                if getattr(self, each) not in (None, ""):
                    raise ValueError(f"{each} is only valid for kind=llm")
        return self


class PostedStage(PostedItem):
    """What holds for a stage: where its calls go, and what is put into them."""

    kind_: ClassVar[PostedKind] = PostedKind.STAGE
    named_by: ClassVar[str] = "id"
    id: Name
    backend: Text = ""
    """Empty: whatever else places the call."""
    reasoning_effort: Text = ""
    prompt: Annotated[str, Field(max_length=MOST_PROMPT_CHARS)] = ""
    """Takes the place of a leading system or developer message; empty: there is none."""
    capture_io: bool = False
    labels: Names | dict[Name, JsonValue] = {}
    """A list: data labels of the stage, which policies heed. An object is the operator's own, and is only kept."""

    @property
    def data_labels(self) -> tuple[str, ...]:
        """The labels that the stage's data has."""
        return self.labels if isinstance(self.labels, tuple) else ()


class PostedMapping(PostedItem):
    """A variant of the mapping: stages that go elsewhere for calls that name it."""

    kind_: ClassVar[PostedKind] = PostedKind.MAPPING
    name: Name
    overrides: Annotated[dict[Name, Name], Field(min_length=1, max_length=MOST_NAMED)]


class PostedPolicy(PostedItem):
    """An access policy; its globs are the guard's to read."""

    kind_: ClassVar[PostedKind] = PostedKind.POLICY
    name: Name
    subjects: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST_NAMED)]
    resources: Annotated[tuple[Name, ...], Field(min_length=1, max_length=MOST_NAMED)]
    action: Literal["allow", "deny"]


class PostedSkill(PostedItem):
    """What a skill of v1 needs."""

    kind_: ClassVar[PostedKind] = PostedKind.SKILL
    name: Name
    requires_backends: Names = ()
    requires_tools: Names = ()
    requires_labels: Names = ()


class PostedEdge(BaseModel):
    """One stage's output is another one's input."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, populate_by_name=True)
    from_: Name = Field(alias="from")
    to: Name


class PostedDeclassification(BaseModel):
    """Labels that a stage takes off what it passes on."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    stage_id: Name
    labels: Names


class PostedWorkflow(PostedItem):
    """The graph of a workflow of v1's clients."""

    kind_: ClassVar[PostedKind] = PostedKind.WORKFLOW
    named_by: ClassVar[str] = "workflow_id"
    workflow_id: Name
    edges: Annotated[tuple[PostedEdge, ...], Field(max_length=MOST_NAMED)] = ()
    declassifications: Annotated[tuple[PostedDeclassification, ...], Field(max_length=MOST_NAMED)] = ()


class PostedSetting(PostedItem):
    """One of the few settings, by its name: ``stage-mapper``, ``scheduler-policy`` (outside services), ``costs``."""

    kind_: ClassVar[PostedKind] = PostedKind.SETTING
    name: Literal["stage-mapper", "scheduler-policy", "costs"]
    url: Annotated[str, Field(max_length=2000)] = ""
    """Empty: nothing is asked."""
    timeout_ms: int = Field(HOOK_MS, ge=1, le=MOST_HOOK_MS)
    refresh_interval_ms: int = Field(REFRESH_MS, ge=1000, le=86_400_000)


T = TypeVar("T", bound=PostedItem)
M = TypeVar("M", bound=BaseModel)

MODELS: Mapping[PostedKind, type[PostedItem]] = {
    each.kind_: each
    for each in (
        PostedBackend, PostedStage, PostedMapping, PostedPolicy, PostedSkill, PostedWorkflow, PostedSetting
    )
}  # fmt: skip


def read_item(model: type[T], given: Mapping[str, Any]) -> T:
    """Return what an object says.

    Raises:
        ConfigError: It has fields that are not known, or values that cannot be.
    """
    return read_fields(model, given)


def read_fields(model: type[M], given: Mapping[str, Any]) -> M:
    """Return what an object of JSON says, read as strictly as JSON's own types allow.

    Raises:
        ConfigError: It has fields that are not known, or values that cannot be.
    """
    try:
        text = json.dumps(given, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"it holds what JSON cannot: {error}") from None
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        faults = [_fault(model, dict(fault)) for fault in error.errors(include_url=False)]
        raise ConfigError("; ".join(dict.fromkeys(faults))[:1000]) from None


def _fault(model: type[BaseModel], fault: dict[str, Any]) -> str:
    where = ".".join(str(each) for each in fault["loc"])
    if fault["type"] == "extra_forbidden":
        return f"unknown field {shown(where)}{did_you_mean(where, model.model_fields)}"
    if fault["type"] == "missing":
        return f"{where} is required"
    ours = fault.get("ctx", {}).get("error")
    said = fault["msg"] if ours is None else str(ours)
    return f"{where}: {said}" if where else said


def finite(number: float | None) -> float | None:
    """Return a number that JSON can hold; ``None`` for any other."""
    return number if number is not None and math.isfinite(number) else None
