"""Two nodes, one line to wrap them, and what orla_lg knows afterwards. Needs `pip install 'orla-lg[demo]'`."""

from typing import TypedDict

from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from orla_lg import Backend, Orla
from orla_lg_llamacpp.embedded import EmbeddedEngine


class State(TypedDict, total=False):
    topic: str
    facts: str
    poem: str


with EmbeddedEngine() as engine, Orla([Backend("local", engine.url, engine="llamacpp")], {"*": "local"}) as orla:
    llm = ChatOpenAI(model="any", base_url=engine.url, api_key="none", max_completion_tokens=40)
    builder = StateGraph(State)
    builder.add_node("research", lambda s: {"facts": llm.invoke(f"Tell me a fact about {s['topic']}.").text})
    builder.add_node("write", lambda s: {"poem": llm.invoke(f"Write one line of verse: {s['facts']}").text})
    builder.add_edge(START, "research").add_edge("research", "write")
    graph = orla.wrap(builder)
    print(graph.invoke({"topic": "the sea"})["poem"], "\n")
    for record in orla.records():
        print(f"{record.stage}: {record.backend}, {record.duration_s:.2f} s, {record.completion_tokens} tokens")
