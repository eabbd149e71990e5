"""The Orla paper's customer support workflow (its Figures 5 to 8), written with its own API.

    python examples/paper_workflow.py "My Lumo lamp was charged twice, please refund it."
    python examples/paper_workflow.py --light http://127.0.0.1:8001/v1 --heavy http://127.0.0.1:8002/v1 "..."

    classify ─┬─ policy_check ── reply
              └─ route_ticket

Without URLs two embedded engines answer (`pip install 'orla-lg[demo]'`). Their model is too small to call tools, so
that the letter is only written; an engine that can call tools sends it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

from langchain_core.messages import BaseMessage, HumanMessage
from langchain_core.tools import tool
from pydantic import BaseModel

from orla_lg import Backend, Hints, Orla, Stage, Upstream, Workflow
from orla_lg.demo.tools import read_policy_yaml, read_team_descriptions

TICKET = "Hello, I was charged twice for my Lumo lamp. Please refund the second payment. Anna"
Category = Literal["billing", "technical", "shipping", "account", "general"]


class Classification(BaseModel):
    category: Category
    product: str


@tool
def read_policy(category: Category) -> str:
    """Return the company's policy for one category of tickets."""
    return str(read_policy_yaml.invoke({"policy": category}))


@tool
def send_email(subject: str, body: str) -> str:
    """Send an email to the customer who wrote the ticket."""
    print(f"To the customer: {subject}\n{body}\n")
    return "sent"


def check_policy(upstream: Upstream, given: Any) -> str:  # Figure 7
    return (
        f"Review this classification against company policy: read the policy of its category, then say what it "
        f"promises, in one sentence.\nClassification: {upstream['classify'].text}\nOriginal ticket: {given['ticket']}"
    )


def write_reply(upstream: Upstream, given: Any) -> Sequence[BaseMessage]:
    """Go on from the talk about the policy: the heavy engine has it in its cache."""
    return [*upstream["policy_check"].messages, HumanMessage("Now send the customer a short answer by email.")]


def urgency(upstream: Upstream, given: Any) -> Hints:  # Figure 6
    return Hints(priority=8 if upstream["classify"].parsed.category in ("billing", "technical") else 5)


def choose_team(upstream: Upstream, given: Any) -> str:
    return (
        f"Teams:\n{read_team_descriptions.invoke({})}\n\nWhich team handles this ticket? Answer with its name.\n"
        f"{upstream['classify'].text}"
    )


def support(orla: Orla, light: Backend, heavy: Backend) -> Workflow:
    def ask(upstream: Upstream, given: Any) -> str:
        return f"What is this ticket about?\n{given['ticket']}"

    tools = [read_policy, send_email]  # the same for both stages: a chat template writes them where the prompt begins
    # Figures 5 and 8: classify is the light engine's only stage, so its cache may go as soon as it is done.
    classify = Stage("classify", light, prompt=ask, response_format=Classification, cache="flush", max_tokens=60)
    policy = Stage(
        "policy_check", heavy, mode="agent_loop", tools=tools, prompt=check_policy, temperature=0, max_tokens=120
    )
    reply = Stage(
        "reply", heavy, mode="agent_loop", tools=tools, messages=write_reply, hints=urgency, cache="preserve",
        temperature=0, max_tokens=200,
    )  # fmt: skip
    route = Stage("route_ticket", heavy, mode="agent_loop", prompt=choose_team, temperature=0, max_tokens=30)

    workflow = Workflow(orla, "support")
    workflow.add_stage(classify, policy, reply, route)
    workflow.add_dependency(policy, classify)
    workflow.add_dependency(reply, policy)
    workflow.add_dependency(route, classify)
    return workflow


@contextmanager
def engines(light: str | None, heavy: str | None) -> Iterator[tuple[Backend, Backend]]:
    with ExitStack() as stack:
        yield tuple(  # type: ignore[misc]
            Backend(name, url) if url else stack.enter_context(_embedded(name))
            for name, url in (("light", light), ("heavy", heavy))
        )


@contextmanager
def _embedded(name: str) -> Iterator[Backend]:
    from orla_lg_llamacpp.embedded import EmbeddedEngine, EngineSettings

    with EmbeddedEngine(EngineSettings(slots=2, context_tokens=2048)) as engine:
        yield Backend(name, engine.url, engine.name, "llamacpp")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("ticket", nargs="?", default=TICKET)
    parser.add_argument("--light", metavar="URL", help="an OpenAI-compatible engine, ending in /v1")
    parser.add_argument("--heavy", metavar="URL", help="another one, for the stages after the first")
    args = parser.parse_args(arguments)
    # Figure 6: the policy between stages is the Orla's, for all workflows that share the engines.
    with (
        engines(args.light, args.heavy) as (light, heavy),
        Orla([light, heavy], stage_policy="priority", request_policy="fcfs") as orla,
    ):
        results = support(orla, light, heavy).execute({"ticket": args.ticket})  # Figure 8: flushed at its end
        for name, result in results.items():
            print(f"{name:<13} {result.text}")
        for record in orla.records():
            cached = f"{record.cached_tokens}/{record.prompt_tokens} prompt tokens cached"
            print(f"{record.stage:<13} {record.backend}, priority {record.priority:g}, {cached}")


if __name__ == "__main__":
    main()
