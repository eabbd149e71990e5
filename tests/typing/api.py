"""Never run: mypy must accept the public face as the documentation shows it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, assert_type

from langchain_core.messages import AIMessage
from langchain_core.tools import BaseTool, StructuredTool
from langchain_openai import ChatOpenAI
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph

from orla_lg import (
    Ahead,
    Assignment,
    Backend,
    BackendView,
    CacheAction,
    CacheEvent,
    Call,
    ChatOrla,
    Cost,
    Current,
    DemoteInterrupted,
    EventKind,
    FlushAtBoundary,
    FlushUnderPressure,
    Hints,
    Holding,
    Joined,
    Limit,
    Limits,
    Orla,
    OrlaSaver,
    PreserveIncrements,
    Queued,
    Record,
    Returns,
    Stage,
    StageOutlook,
    StageResult,
    Statistics,
    Upstream,
    Verb,
    WarmReturns,
    Workflow,
)
from orla_lg.core.backend import BackendAdapter, Capability, Directions, Effect, Probe, Support
from orla_lg.core.call import Ask, Chunk, Usage
from orla_lg.core.control import KVControl, Scope, WholeCache, WorkflowCache
from orla_lg.core.policies import Fair, Policies, RequestPolicy, Sortable, StagePolicy
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, OpenAIAdapter, advised
from orla_lg.testing.conformance import conform
from orla_lg.testing.faults import Fault, FaultEngine
from orla_lg.testing.virtual import VirtualServing


class State(TypedDict):
    text: str


class Cheapest:
    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:
        return Assignment(min(backends, key=lambda backend: backend.cost.input_per_mtoken).name, mapper="cheapest")


class ShortestPrompt:
    def key(self, head: Queued, now: float) -> tuple[int]:
        return (head.call.ask.prompt_chars,)


class FlushWhenIdle:
    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:
        return [CacheAction(Verb.FLUSH, event.workflow)] if event.kind is EventKind.IDLE else []


class ReleaseLongest:
    def decide(self, event: CacheEvent) -> Sequence[CacheAction]:
        if event.kind is not EventKind.PRESSURE:
            return ()
        longest: Holding = max(event.holdings, key=lambda held: (held.alone_tokens, held.chance))
        return [CacheAction(Verb.RELEASE, longest.workflow, event.backend, after_s=0.5)]


def hints(stage: str, state: State) -> Hints | None:
    return Hints(priority=len(state["text"]))


heavy = Backend("heavy", "http://h/v1", max_concurrency=32, cost=Cost(input_per_mtoken=0.2), quality=0.9)
orla = Orla(
    backends=[Backend("light", "http://l/v1", model="Qwen/Qwen3-4B", engine="vllm", aliases=["gpt"]), heavy],
    mapper={"classify": "light", "*": ["heavy", "light"]},
    policy="priority",
    stage_policy="priority",
    request_policy="fcfs",
    memory="default",
    limits=Limits(Limit(calls=50), tenants={"*": Limit(cost_usd=0.5, per_s=3600)}),
)
mine = Orla(
    [heavy], Cheapest(), stage_policy=ShortestPrompt(), request_policy=ShortestPrompt(), memory=FlushWhenIdle()
)
rules = Joined(FlushAtBoundary(), PreserveIncrements(small=0.3), DemoteInterrupted(after_s=60), WarmReturns())
Orla([heavy], memory=Joined(rules, ReleaseLongest(), FlushUnderPressure()))
assert_type(Returns().usual_s, float | None)
builder = StateGraph(State)
graph: CompiledStateGraph[State, None, State, State] = orla.wrap(builder.compile(), hints=hints)
orla.wrap(graph, mapper={"classify": "light"}, limits=Limits(Limit(wall_s=30))).invoke({"text": "hello"})
looked: BaseTool = StructuredTool.from_function(str)
orla.wrap(graph, tools_safe=[looked, "search"])
orla.wrap(graph, tools_safe=None)
orla.wrap(graph, tools_safe={"search"})
orla.limits = Limits(stages={"classify": Limit(tokens=1000)})
assert_type(orla.limits, Limits)
model: ChatOpenAI = ChatOrla(orla=orla, model="heavy")
answer: AIMessage = ChatOrla(orla=orla, model="heavy").invoke("hello")
saver: BaseCheckpointSaver[str] = OrlaSaver(orla, inner=InMemorySaver())
assert_type(Orla.from_config("orla.toml").records(), list[Record])
assert_type(Orla.from_env().statistics(), Statistics)
assert_type(orla.prioritize("run", 3.0), bool)
assert_type(orla.move("thread", "heavy", tenant="acme"), bool)
assert_type(orla.current(), Current | None)


async def later(upstream: Upstream, given: dict[str, str]) -> str:
    return upstream["first"].text + given["text"]


first = Stage("first", heavy, prompt=lambda upstream, given: "hello", hints=lambda upstream, given: Hints(priority=8))
workflow = Workflow(orla, "two").add_stage(first, Stage("second", prompt=later)).add_dependency("second", first)
assert_type(workflow.execute({"text": "you"}), dict[str, StageResult])
workflow.compile(checkpointer=InMemorySaver()).invoke({"input": {"text": "you"}})
assert_type(orla.outlook(graph), list[StageOutlook])
assert_type(orla.ahead(), Ahead | None)
orla.pause("heavy")
assert_type(orla.drain("heavy", timeout_s=30), bool)
orla.resume("heavy")
orla.set_policy(stage_policy={"heavy": ShortestPrompt()}, request_policy="edf", backend=None)
orla.set_policy(policy=ShortestPrompt())
Orla({"light": "http://127.0.0.1:8001/v1", "heavy": heavy}, policy="priority")
Orla("http://127.0.0.1:8001/v1")
Orla(heavy, policy=ShortestPrompt())
orla.set_limit("heavy", max_concurrency=None, capacity=100)
assert_type(orla.statistics().backends["heavy"].memory.truth.verified_tokens, int)
assert_type(orla.records()[0].cache_borne_out, bool | None)
assert_type(orla.stages(graph, mapper={"classify": "light"}).inside[0].by, str)
waiting: list[str] = [call.stage for call in orla.statistics().backends["heavy"].waiting]
with orla as entered:
    assert_type(entered, Orla)
orla.close()


class Flushing(OpenAIAdapter):
    """An adapter of a third party, with the documented import paths alone."""

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, object]:
        return {"priority": -round(told.priority)}

    async def probe(self) -> Probe:
        capabilities = {**PLAIN_CAPABILITIES, Capability.PIN: Support.NATIVE}
        return advised(await super().probe(), capabilities=capabilities)

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        return Effect.UNSUPPORTED

    async def release(self, scope: Scope) -> Effect:
        return Effect.DEMOTED if isinstance(scope, WorkflowCache) else Effect.UNSUPPORTED

    async def flush(self, scope: Scope) -> Effect:
        return Effect.FREED if isinstance(scope, WholeCache) else Effect.UNSUPPORTED


class Newest:
    def key(self, head: Queued, now: float) -> Sortable:
        return (-head.order,)


flushing = Flushing(heavy)
adapter: BackendAdapter = flushing
control: KVControl = flushing
stage_policy: StagePolicy = Fair({"acme": 2.0})
request_policy: RequestPolicy = Newest()
assert_type(Policies(stage_policy, {"*": request_policy}).of("stage"), RequestPolicy)
chunk = Chunk("text", Usage(prompt_tokens=3))
shipped = (conform, Fault, FaultEngine, VirtualServing)
