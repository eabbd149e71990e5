"""The demo's support desk, used from outside: import a plain graph, wrap it, run a ticket.

    python examples/support_ticket.py "My Lumo lamp was charged twice, please refund it."
    python examples/support_ticket.py --url http://127.0.0.1:8000/v1 "..."

Without --url an embedded engine answers (`pip install 'orla-lg[demo]'`).
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from orla_lg import Backend, Orla
from orla_lg.demo.graph import chat_model, support_graph
from orla_lg.demo.run import priorities

TICKET = "Hello, I was charged twice for my Lumo lamp. Please refund the second payment. Anna"


@contextmanager
def engine(url: str | None) -> Iterator[Backend]:
    if url:
        yield Backend("engine", url)
        return
    from orla_lg_llamacpp.embedded import EmbeddedEngine

    with EmbeddedEngine() as embedded:
        yield Backend("engine", embedded.url, engine="llamacpp")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ticket", nargs="?", default=TICKET)
    parser.add_argument("--url", help="an OpenAI-compatible engine, ending in /v1")
    args = parser.parse_args()
    with engine(args.url) as backend, Orla([backend], {"*": "engine"}, policy="priority") as orla:
        plain = support_graph(chat_model(backend.url, "any"), Path("outbox.jsonl"))
        graph = orla.wrap(plain, hints=priorities)  # the one line
        answer = asyncio.run(graph.ainvoke({"ticket": args.ticket}))
        print(answer["email"].body, "\n")
        for record in orla.records():
            print(f"{record.stage:<13} {record.cached_tokens}/{record.prompt_tokens} prompt tokens cached")


if __name__ == "__main__":
    main()
