"""Embeddings are a stage beside their node's own: recorded, and served where a mapping names them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from langchain_core.language_models import SimpleChatModel
from langchain_openai import OpenAIEmbeddings
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import START, MessagesState, StateGraph

from orla_lg import Backend, BudgetExceeded, Limit, Limits, MappingError, Orla
from orla_lg.mappers import CostQualityMapper, First, LoadAware
from tests.conftest import BACKEND_KEY, CALLER_KEY, at, chat
from tests.stub_engine import StubEngine

HI: Any = {"messages": [("user", "hi")]}
THREAD: Any = {"configurable": {"thread_id": "t"}}
MakeOrla = Callable[..., Orla]


def vectors(body: dict[str, Any]) -> dict[str, Any]:
    given = body["input"]
    texts = [given] if isinstance(given, str) else given
    data = [{"object": "embedding", "index": n, "embedding": [float(len(text)), 0.0]} for n, text in enumerate(texts)]
    return {"object": "list", "model": "e", "data": data, "usage": {"prompt_tokens": 7, "total_tokens": 7}}


def native(body: dict[str, Any]) -> dict[str, Any]:
    texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
    return {"model": "e", "embeddings": [[1.0, 0.0] for _ in texts], "prompt_eval_count": 7}


@pytest.fixture
def embedder() -> Iterator[StubEngine]:
    with StubEngine(models=("e",), speaks={"/v1/embeddings": vectors}) as running:
        yield running


@pytest.fixture
def theirs() -> Iterator[StubEngine]:
    with StubEngine(speaks={"/v1/embeddings": vectors, "/api/embed": native}) as running:
        yield running


def openai_s(theirs: StubEngine) -> Any:
    return OpenAIEmbeddings(
        model="text-embedding-3-small", base_url=theirs.url, api_key=CALLER_KEY, check_embedding_ctx_length=False
    )  # type: ignore[call-arg, arg-type]


def ollama_s(theirs: StubEngine) -> Any:
    made = pytest.importorskip("langchain_ollama", reason="needs the package langchain-ollama")
    return made.OllamaEmbeddings(model="nomic-embed-text", base_url=theirs.url.removesuffix("/v1"))


USES: dict[str, Callable[[Any], Any]] = {
    "query": lambda embeddings: embeddings.embed_query("hello"),
    "documents": lambda embeddings: embeddings.embed_documents(["hello", "world!"])[0],
    "async": lambda embeddings: asyncio.run(embeddings.aembed_query("hello")),
}


def graph(body: Callable[[], Any], name: str = "retrieve", **compiled: Any) -> Any:
    def run(state: MessagesState) -> Any:
        body()
        return {}

    return StateGraph(MessagesState).add_node(name, run).add_edge(START, name).compile(**compiled)


def two(make_orla: MakeOrla, engine: StubEngine, embedder: StubEngine, mapper: Any, **settings: Any) -> Orla:
    return make_orla(at(engine), at(embedder, "embedder", model="e"), mapper=mapper, **settings)


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("name", ["retrieve:embeddings", "*:embeddings"])
@pytest.mark.parametrize("made", [openai_s, ollama_s])
def test_they_are_served_where_a_mapping_names_them(
    engine: StubEngine, embedder: StubEngine, theirs: StubEngine, make_orla: MakeOrla, use: str, name: str, made: Any
) -> None:
    orla = two(make_orla, engine, embedder, {name: "embedder", "*": "main"})
    embeddings, said = made(theirs), []
    bare = USES[use](embeddings)
    asked = len(theirs.requests)
    orla.wrap(graph(lambda: said.append(USES[use](embeddings)))).invoke(HI)
    assert len(said[0]) == len(bare) == 2 and (made is ollama_s or said[0] == bare)
    assert len(theirs.requests) == asked, "the code's own address is not asked"
    (seen,) = [seen for seen in embedder.requests if seen.path == "/v1/embeddings" and seen.body.get("input")]
    assert (seen.key, seen.body["model"]) == (BACKEND_KEY, "e")
    assert not {"id_slot", "cache_prompt", "cache_salt", "priority"} & set(seen.body)
    (record,) = orla.records()
    assert (record.stage, record.backend, record.model, record.external) == (
        "retrieve:embeddings", "embedder", "e", False,
    )  # fmt: skip
    assert (record.mapper, record.reason, record.prompt_tokens) == ("explicit", f"mapping[{name!r}]", 7)


@pytest.mark.parametrize(
    "mapper",
    [
        None, {"*": "main"}, {"retrieve": "main"}, {"other:embeddings": "embedder", "*": "main"},
        CostQualityMapper(), First(CostQualityMapper(), {"*": "main"}),
    ],
)  # fmt: skip
def test_they_pass_by_where_none_does(
    engine: StubEngine, embedder: StubEngine, theirs: StubEngine, make_orla: MakeOrla, mapper: Any,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    orla = two(make_orla, engine, embedder, mapper)
    embeddings = openai_s(theirs)
    orla.wrap(graph(lambda: embeddings.embed_query("hello"))).invoke(HI)
    assert [seen.key for seen in theirs.requests] == [CALLER_KEY]
    (record,) = orla.records()
    assert (record.stage, record.backend, record.external) == ("retrieve:embeddings", None, True)
    assert record.model == "text-embedding-3-small"
    assert record.reason == "no mapping names its stage"
    said = [
        each.getMessage() for each in caplog.records if each.name == "orla_lg" and "other:" not in each.getMessage()
    ]
    assert len(said) == 1 and "mapper={'retrieve:embeddings': 'main'} would serve them here" in said[0]


def test_a_table_in_another_mapper_names_them(
    engine: StubEngine, embedder: StubEngine, theirs: StubEngine, make_orla: MakeOrla
) -> None:
    mapper = LoadAware({"*": "main", "*:embeddings": ["main", "embedder"]})
    orla = two(make_orla, engine, embedder, First(CostQualityMapper(), mapper))
    embeddings = openai_s(theirs)
    orla.variant("other", {"retrieve:embeddings": "embedder"})
    wrapped = orla.wrap(graph(lambda: embeddings.embed_query("hello")))
    wrapped.invoke(HI, {"configurable": {"orla": {"variant": "other"}}})
    assert [record.backend for record in orla.records()] == ["embedder"]


def test_nothing_of_them_counts_as_cache(engine: StubEngine, theirs: StubEngine, make_orla: MakeOrla) -> None:
    with StubEngine(models=("e",), slots=1, speaks={"/v1/embeddings": vectors}) as embedder:
        orla = two(make_orla, engine, embedder, {"*:embeddings": "embedder", "*": "main"}, warm_up=True)
        embeddings, llm = openai_s(theirs), chat(engine)

        def body() -> None:
            llm.invoke("hi")
            embeddings.embed_query("hello")
            embeddings.embed_query("hello")

        for _ in range(3):
            orla.wrap(graph(body, checkpointer=InMemorySaver())).invoke(HI, THREAD)
        serving = orla.core.serving
        assert [record.backend for record in orla.records()] == ["main", "embedder", "embedder"] * 3
        assert {record.workflow for record in orla.records()} == {"t"}
        assert set(serving.schedulers["main"].cache.workflows()) == {"t"}, "it did not leave"
        assert "t" not in serving.schedulers["embedder"].cache.workflows()
        held = serving.schedulers["embedder"].cache.statistics()
        assert (held.slots_held, held.tokens) == (0, 0)
        name = next(iter(serving.lookahead._forecasts))
        assert serving.estimates.learned(name, "retrieve").calls == 1, "its calls of chat models alone"
        serving.check_integrity()


class Retrieves(SimpleChatModel):
    """A chat model that asks for embeddings, and makes its own request by other ways."""

    embeddings: Any

    @property
    def _llm_type(self) -> str:
        return "retrieves"

    def _call(self, *args: Any, **kwargs: Any) -> str:
        self.embeddings.embed_query("hello")
        return "said"


@pytest.mark.parametrize("made", [openai_s, ollama_s])
def test_they_are_not_the_request_that_a_chat_model_owes(
    engine: StubEngine, embedder: StubEngine, theirs: StubEngine, make_orla: MakeOrla, made: Any
) -> None:
    orla = two(make_orla, engine, embedder, {"*:embeddings": "embedder", "*": "main"})
    llm = Retrieves(embeddings=made(theirs))
    orla.wrap(graph(lambda: llm.invoke("hi"))).invoke(HI)
    assert [(record.stage, record.external) for record in orla.records()] == [
        ("retrieve:embeddings", False), ("retrieve", True),
    ]  # fmt: skip


def test_limits_of_them(engine: StubEngine, embedder: StubEngine, theirs: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, embedder, {"*:embeddings": "embedder", "*": "main"})
    embeddings, llm = openai_s(theirs), chat(engine)

    def body() -> None:
        llm.invoke("hi")
        embeddings.embed_query("hello")

    stages = {"retrieve:embeddings": Limit(calls=1), "retrieve": Limit(calls=9)}
    own = orla.wrap(graph(body), limits=Limits(stages=stages))
    own.invoke(HI)
    with pytest.raises(BudgetExceeded, match="'retrieve:embeddings'"):
        own.invoke(HI)
    assert {each.name: each.spent.calls for each in orla.statistics().limits} == {
        "retrieve:embeddings": 1, "retrieve": 2,
    }  # fmt: skip
    with pytest.raises(BudgetExceeded, match="run"):
        orla.wrap(graph(body), limits=Limits(run=Limit(calls=1))).invoke(HI)


def test_another_backend_steps_in(
    engine: StubEngine, embedder: StubEngine, theirs: StubEngine, make_orla: MakeOrla
) -> None:
    dead = Backend("dead", "http://127.0.0.1:1/v1", model="e")
    orla = make_orla(dead, at(embedder, "embedder", model="e"), mapper={"*:embeddings": ["dead", "embedder"]})
    embeddings = openai_s(theirs)
    orla.wrap(graph(lambda: embeddings.embed_query("hello"))).invoke(HI)
    assert [(record.backend, record.attempts) for record in orla.records()] == [("embedder", 2)]


def test_names_are_held_against_the_graph(
    engine: StubEngine, embedder: StubEngine, make_orla: MakeOrla, caplog: pytest.LogCaptureFixture
) -> None:
    names = {"*": "main", "retreive:embeddings": "embedder", "*:embeddings": "embedder"}
    orla = two(make_orla, engine, embedder, names)
    bare = graph(lambda: None)
    for name, fault in {
        "retreive:embeddings": "which the graph does not have; did you mean 'retrieve:embeddings'",
        "retrieve:embedding": "behind a node only ':embeddings' may stand",
    }.items():
        with pytest.raises(MappingError, match=fault):
            orla.wrap(bare, mapper={name: "embedder", "*": "main"})
    orla.wrap(bare, mapper={"retrieve:embeddings": "embedder", "*": "main"})
    (warned,) = [each.getMessage() for each in caplog.records if each.name == "orla_lg"]
    assert "'retreive:embeddings'" in warned and "'retrieve:embeddings' is the nearest" in warned


def test_the_plan_shows_those_that_are_named(engine: StubEngine, embedder: StubEngine, make_orla: MakeOrla) -> None:
    orla = two(make_orla, engine, embedder, {"*": "main", "retrieve:embeddings": "embedder"})
    bare = graph(lambda: None)
    assert [(each.stage, each.backends) for each in orla.plan(bare)] == [
        ("retrieve", ("main",)), ("retrieve:embeddings", ("embedder",)),
    ]  # fmt: skip
    (shown,) = [each for each in orla.stages(bare).walk() if each.name == "embeddings"]
    assert (shown.stage, shown.by) == ("retrieve:embeddings", "mapping['retrieve:embeddings']")
