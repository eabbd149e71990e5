"""A support desk as several web workers, with one core for all of them: how to start it is in README.md."""

import os
from typing import Any

from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, MessagesState, StateGraph
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from orla_lg import Orla

# "auto" is the server's first engine; a [mapping] in its orla.toml sends stages elsewhere. The key and the address
# are of no engine: the server decides where each call goes.
model = ChatOpenAI(model="auto", api_key="none", base_url="http://127.0.0.1:9/v1", max_tokens=40)


async def classify(state: MessagesState) -> dict[str, Any]:
    question = state["messages"][-1].content
    return {"messages": [await model.ainvoke(f"Answer with one word, question or complaint: {question}")]}


async def answer(state: MessagesState) -> dict[str, Any]:
    return {"messages": [await model.ainvoke(state["messages"])]}


builder = StateGraph(MessagesState)
builder.add_node("classify", classify)
builder.add_node("answer", answer)
builder.add_edge(START, "classify")
builder.add_edge("classify", "answer")
builder.add_edge("answer", END)

orla = Orla.remote()  # the server that ORLA_SERVER names; each worker has a link of its own
graph = orla.wrap(builder)


async def ask(request: Request) -> JSONResponse:
    said = (await request.body()).decode()
    config = {"configurable": {"orla": {"priority": float(request.headers.get("x-priority", "0"))}}}
    done = await graph.ainvoke({"messages": [("user", said)]}, config)
    return JSONResponse({"answer": done["messages"][-1].content, "worker": os.getpid()})


async def load(_: Request) -> JSONResponse:
    """Show what all workers together have at each engine, and what waits."""
    backends = orla.statistics().backends
    return JSONResponse({name: [now.queue.in_flight, now.queue.waiting] for name, now in backends.items()})


app = Starlette(routes=[Route("/ask", ask, methods=["POST"]), Route("/load", load)])
