"""An answer that is only invoked: in one piece, streamed beneath and put together, and watched for its tool calls.

The figure is the CPU time of the thread that makes the call, from its request to the ``AIMessage``. The engine is a
thread of this process, and sends one event at a time; its time is not in the figure.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from statistics import median
from typing import Any, TypedDict
from unittest import mock

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from langgraph.prebuilt import ToolNode

from bench.lib.command import tell
from bench.lib.figures import rotated, spread, table
from orla_lg import Backend, ChatOrla, Orla
from orla_lg.graph import interception
from orla_lg.wires.watching import HeardToolCall

MODEL = "m"
CALLS = 3
USAGE = {"prompt_tokens": 7, "completion_tokens": 200, "total_tokens": 207}


class State(TypedDict):
    took_ms: float


@tool
def search(query: str, limit: int) -> str:
    """Search."""
    return query


def pieces_of(count: int) -> list[bytes]:
    """Return an answer of so many pieces, most of them of its calls' arguments, as events."""
    chunks: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    each = (count - 1) // CALLS - 1
    for number in range(CALLS):
        said = json.dumps({"query": "x" * (4 * each - 26), "limit": number})
        named = {"index": number, "id": f"call_{number}", "type": "function"}
        chunks.append({"tool_calls": [{**named, "function": {"name": "search", "arguments": ""}}]})
        size = -(-len(said) // each)
        chunks += [
            {"tool_calls": [{"index": number, "function": {"arguments": said[at : at + size]}}]}
            for at in range(0, len(said), size)
        ]
    choices: list[Any] = [[{"index": 0, "delta": delta, "finish_reason": None}] for delta in chunks]
    choices += [[{"index": 0, "delta": {}, "finish_reason": "tool_calls"}], []]
    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": MODEL}
    events = [{**head, "choices": each} | ({} if each else {"usage": USAGE}) for each in choices]
    return [*(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events), b"data: [DONE]\n\n"]


def whole_of(events: Sequence[bytes]) -> bytes:
    """Return the same in one piece."""
    calls: dict[int, dict[str, Any]] = {}
    for event in events[:-1]:
        for choice in json.loads(event[6:])["choices"]:
            for call in choice["delta"].get("tool_calls", ()):
                if call["index"] not in calls:
                    calls[call["index"]] = {**call, "function": dict(call["function"])}
                else:
                    calls[call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    for call in calls.values():
        del call["index"]
    message = {"role": "assistant", "content": None, "tool_calls": list(calls.values())}
    choice = {"index": 0, "message": message, "finish_reason": "tool_calls"}
    head = {"id": "x", "object": "chat.completion", "created": 1, "model": MODEL}
    return json.dumps({**head, "choices": [choice], "usage": USAGE}).encode()


@contextmanager
def engine(count: int, token_s: float) -> Iterator[str]:
    """Serve the answer; gives the URL."""
    events = pieces_of(count)
    whole = whole_of(events)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.whole(json.dumps({"data": [{"id": MODEL}]}).encode())

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not body.get("messages"):
                self.send_error(404)
            elif not body.get("stream"):
                time.sleep(token_s * len(events))
                self.whole(whole)
            else:
                self.send_response(200)
                self.send_header("content-type", "text/event-stream")
                self.send_header("transfer-encoding", "chunked")
                self.end_headers()
                for event in events:
                    time.sleep(token_s)
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
                self.wfile.write(b"0\r\n\r\n")

        def whole(self, body: bytes) -> None:
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Silent:
    """Hears all, and does nothing."""

    wants_calls = wants_message = True

    def comes_late(self, why: object) -> None: ...
    def begins(self) -> None: ...
    def tool_call(self, call: HeardToolCall) -> None: ...
    def ends(self, message: Mapping[str, Any] | None) -> None: ...


class Way:
    """One arm: a graph whose node invokes its model, and what is measured of it."""

    def __init__(self, name: str, model: Any, wrap: Callable[[Any], Any]) -> None:
        self.name, self.cpu_ms = name, list[float]()
        self._model = model.bind_tools([search])
        builder = StateGraph(State).add_node("ask", self._ask).add_node("tools", ToolNode([search]))
        builder.add_edge(START, "ask").add_conditional_edges("ask", lambda _: END, [END, "tools"])
        self._graph = wrap(builder.compile())

    def _ask(self, state: State) -> dict[str, float]:
        began_s = time.thread_time()
        answer = self._model.invoke("hello")
        took_ms = (time.thread_time() - began_s) * 1000
        assert len(answer.tool_calls) == CALLS
        return {"took_ms": took_ms}

    def run(self) -> float:
        return float(self._graph.invoke({"took_ms": 0.0})["took_ms"])


@contextmanager
def ways(url: str) -> Iterator[list[Way]]:
    """Give the arms."""
    with ExitStack() as stack:

        def orla(**settings: Any) -> Orla:
            return stack.enter_context(Orla([Backend("main", url, model=MODEL, **settings)], {"*": "main"}))

        bare = ChatOpenAI(model=MODEL, base_url=url, api_key="any")
        watched, early = orla(assemble=True), orla(assemble=True)
        real = interception.watch_for

        def watch_for(core: Any, *asked: Any) -> Any:
            return Silent() if core is watched.core else real(core, *asked)

        stack.enter_context(mock.patch.object(interception, "watch_for", watch_for))
        yield [
            Way("plain `ChatOpenAI`", bare, lambda graph: graph),
            Way("wrapped, in one piece", bare, orla().wrap),
            Way("`ChatOrla`: put together", ChatOrla(orla=orla(), model="main"), lambda graph: graph),
            Way("wrapped, put together and watched", bare, lambda graph: watched.wrap(graph, tools_safe={"search"})),
            Way("and three tools started", bare, lambda graph: early.wrap(graph, tools_safe={"search"})),
        ]


def measure(rounds: int, pieces: int, token_s: float) -> list[str]:
    """Return a table: what each arm takes of its thread, the arms in turn in each round."""
    with engine(pieces, token_s) as url, ways(url) as arms:
        for arm in arms * 2:  # warm
            arm.run()
        for number in range(rounds):
            for arm in rotated(arms, number):
                arm.cpu_ms.append(arm.run())
            tell(f"round {number + 1}/{rounds}", last=number == rounds - 1)
        rows = [[arm.name, spread(arm.cpu_ms).shown(), f"{median(arm.cpu_ms) - median(arms[0].cpu_ms):+.2f}"]
                for arm in arms]  # fmt: skip
    return table((f"an answer of {pieces} pieces", "this thread's CPU, ms (min … max)", "added, ms"), rows)
