"""Split prompts of a replica: prompts stay there, the core behind a real socket decides."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, Orla, WarmUp
from orla_lg.core.memory.events import CacheAction, Verb
from orla_lg.link.messages import FlatMessage
from orla_lg.serve.link.warming import KeptPrompt
from tests.link.real import RealCore
from tests.link.scripted import eventually
from tests.serve.scripted import Key
from tests.tools.prefill_engine import MODEL, PrefillEngine, once
from tests.tools.test_split_prompts import EAGER, PATIENCE_S, QUESTION, Workbench, asked, is_beginning

ISOLATED = {"isolate_tenants": True}


@pytest.fixture
def remote() -> Iterator[Callable[..., tuple[RealCore, Workbench]]]:
    closing: list[Callable[[], Any]] = []

    def make(key: Key | None = None, **backend: Any) -> tuple[RealCore, Workbench]:
        engine = PrefillEngine(once(asked("first", "second", "third")))
        closing.append(engine.__exit__)
        engine.__enter__()
        served = Backend("main", engine.url, model=MODEL, engine="vllm", **backend)
        more = {} if key is None else {"key": key}
        core = RealCore(served, warm_up=WarmUp(), memory=EAGER, **more)
        closing.append(core.__exit__)
        orla = Orla.remote(core.url)
        closing.append(orla.close)
        return core, Workbench(engine, orla)

    yield make
    for close in reversed(closing):
        close()


@pytest.mark.parametrize(
    ("key", "backend", "config"),
    [
        (None, {}, {}),
        (None, ISOLATED, {"configurable": {"thread_id": "t", "orla": {"tenant": "acme"}}}),
        (Key(tenants=("acme",)), {}, {"configurable": {"thread_id": "t"}}),
        (Key(tenants=("acme",)), ISOLATED, {}),
    ],
    ids=["plain", "isolated", "key of a tenant", "both"],
)
def test_the_core_has_a_replica_prefill_what_it_knows_by_hashes(
    remote: Callable[..., tuple[RealCore, Workbench]], key: Key | None, backend: dict[str, Any], config: Any
) -> None:
    core, work = remote(key, **backend)
    work.holds["third"] = work.prefilled
    work.agent().invoke(QUESTION, config)
    prefetch, call = work.engine.prefetches[-1], work.engine.calls[-1]
    assert is_beginning(prefetch, call) and len(prefetch.messages) >= 3
    assert call.cached_tokens > 1000
    assert (work.predictions.predicted, work.predictions.held) == (1, 1)
    warmed = core.serving.schedulers["main"].prefetcher
    eventually(lambda: not core.serving.book.open_runs())
    assert warmed.statistics().split_used_tokens > 0.9 * warmed.statistics().split_warmed_tokens > 0
    assert not warmed.prompts.split
    kept: Any = work.orla.core.serving
    eventually(lambda: not kept.cores.home.prompts._books["main"].split)


def test_the_core_knows_how_many_tools_run_beside_each_other(
    remote: Callable[..., tuple[RealCore, Workbench]], monkeypatch: pytest.MonkeyPatch
) -> None:
    core, work = remote()
    progress, seen = core.serving.progress, list[int]()
    split = progress.prompt_split
    monkeypatch.setattr(progress, "prompt_split", lambda run, of: seen.append(of.at_once) or split(run, of))  # type: ignore[func-returns-value]
    started = threading.Barrier(3)
    work.holds["first"] = work.holds["second"] = lambda: started.wait(PATIENCE_S)
    work.holds["third"] = lambda: (started.wait(PATIENCE_S), work.prefilled())
    work.agent().invoke(QUESTION)
    assert max(seen) == 3


@pytest.mark.parametrize(("engine", "warned"), [("vllm", False), ("openai", True)])
def test_a_replica_warns_where_its_core_prefills_nothing(
    engine: str, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with RealCore(Backend("main", "http://127.0.0.1:9/v1", engine=engine), warm_up=WarmUp()) as core:
        with Orla.remote(core.url) as orla:
            graph = StateGraph(MessagesState).add_node("ask", lambda _: {}).add_edge(START, "ask")
            orla.wrap(graph, split_prompts=True)
    assert ("the core that serves it prefills nothing there" in caplog.text) is warned


def test_a_prompt_that_the_replica_does_not_keep_any_more_is_not_sent(
    remote: Callable[..., tuple[RealCore, Workbench]],
) -> None:
    core, work = remote()
    scheduler = core.serving.schedulers["main"]

    def drop() -> None:
        eventually(lambda: scheduler.prefetcher.prompts.split)
        replica: Any = work.orla.core.serving
        for workflow, stage in list(replica.cores.home.prompts._books["main"].split):
            replica.cores.home.prompts._books["main"].came(workflow, stage)
            scheduler.apply(CacheAction(Verb.WARM, workflow, "main", graph=stage[0], stage=stage[1], next_of="gone"))
        eventually(lambda: scheduler.prefetcher.running is None)

    work.holds["second"] = drop
    work.agent().invoke(QUESTION)
    assert work.engine.calls[-1].messages[-1]["role"] == "tool"


def test_a_kept_prompt_is_extended_by_hashes_and_lengths() -> None:
    from orla_lg.serve.link.flat import UNSENT, FlatAsk

    ask = FlatAsk("m", UNSENT, hashes=[1, 2], chars=[10, 20], text_chars=30)
    base = KeptPrompt("c1", "g", "s", ask, {"frame": 1}, 40, 10)
    longer = base.extended([FlatMessage(3, 5), FlatMessage(4, 35)])
    assert (longer.ask.prefix, longer.chars, longer.tokens) == ((1, 2, 3, 4), 80, 20)
    assert [index for index in range(4) if longer.ask.is_answer(index)] == [2]
    again = longer.extended([FlatMessage(3, 5)])
    assert (again.ask.prefix, again.base) == ((1, 2, 3), base), "it is what follows on the call, each time"
