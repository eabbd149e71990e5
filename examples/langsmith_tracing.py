"""A traced run: in LangSmith each model run shows where it ran, how long it waited and what was cached.

    export LANGSMITH_TRACING=true LANGSMITH_API_KEY=...      # and LANGSMITH_ENDPOINT for your own server
    python examples/langsmith_tracing.py --url http://127.0.0.1:8001/v1

Nothing in the code is about tracing: LangChain traces the graph, and orla_lg writes its record on the trace as
``orla_backend``, ``orla_queue_wait_s``, ``orla_ttft_s``, ``orla_cached_tokens`` and so on, with an event
``orla_left_queue`` at the moment the call left the queue.
"""

from __future__ import annotations

import argparse
import sys

import httpx
from langchain_core.tracers.langchain import wait_for_all_tracers
from langchain_openai import ChatOpenAI
from langgraph.graph import START, MessagesState, StateGraph
from langsmith import utils

from orla_lg import Backend, Orla

CLOUD = "https://api.smith.langchain.com"
PATIENCE_S = 3.0

llm = ChatOpenAI(model="any", api_key="not used here", max_tokens=40, streaming=True)


def draft(state: MessagesState) -> dict:
    return {"messages": [llm.invoke([("system", "Draft an answer."), *state["messages"]])]}


def polish(state: MessagesState) -> dict:
    return {"messages": [llm.invoke([("system", "Draft an answer."), *state["messages"], ("user", "Shorter!")])]}


def tracing_fault() -> str | None:
    """Return why no trace would arrive: one request says so at once, where LangSmith's client tries for long."""
    if not utils.tracing_is_enabled():
        return "tracing is off; set LANGSMITH_TRACING=true"
    endpoint, key = utils.get_env_var("ENDPOINT", default=CLOUD), utils.get_env_var("API_KEY")
    if not key and httpx.URL(endpoint).host.endswith("langchain.com"):
        return (
            f"LANGSMITH_API_KEY is not set, which {endpoint} asks for; LANGSMITH_ENDPOINT names a server of your own"
        )
    try:
        answer = httpx.get(
            f"{endpoint}/sessions", params={"limit": 1}, headers={"x-api-key": key or ""}, timeout=PATIENCE_S
        )
    except httpx.HTTPError as error:
        return f"no collector of traces answers at {endpoint} ({type(error).__name__}: {error})"
    refused = answer.status_code in (401, 403)
    return f"{endpoint} does not take this LANGSMITH_API_KEY (status {answer.status_code})" if refused else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", required=True, help="an engine; `orla-lg engine up` starts one")
    parser.add_argument("--engine", default="llamacpp", choices=["llamacpp", "openai"])
    args = parser.parse_args()
    if fault := tracing_fault():
        sys.exit(f"{parser.prog}: {fault}")

    builder = StateGraph(MessagesState)
    builder.add_node("draft", draft)
    builder.add_node("polish", polish)
    builder.add_edge(START, "draft")
    builder.add_edge("draft", "polish")

    with Orla([Backend("mine", args.url, engine=args.engine)], {"*": "mine"}) as orla:
        graph = orla.wrap(builder)
        graph.invoke({"messages": [("user", "Why does my router blink red?")]}, {"run_name": "router"})
        wait_for_all_tracers()
        for record in orla.records():
            print(
                f"{record.stage:8} ttft {record.ttft_s:.3f} s, cached {record.cached_tokens}/{record.prompt_tokens}"
            )


if __name__ == "__main__":
    main()
