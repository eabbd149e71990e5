"""A customer support desk as a plain LangGraph graph, written with ``ChatOpenAI`` as anybody would.

Nothing in this file knows of orla_lg. ``classify`` reads a ticket; ``policy_check`` and ``route_ticket``
work on it in parallel, each reading a file with a tool; ``reply`` writes to the customer::

    classify ─┬─ policy_check ─┬─ reply
              └─ route_ticket ─┘

The later prompts of one ticket begin with the same text (company, ticket, classification) and each goes on
from the talk before, so that an engine can answer them from its cache. Small models do not call tools
reliably, so a tool is asked for in JSON that follows a schema; answers that cannot be used are replaced
(``fallbacks``) and counted.
"""

from __future__ import annotations

import json
import operator
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict, get_args

from langchain_core.exceptions import OutputParserException
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph
from openai import ContentFilterFinishReasonError, LengthFinishReasonError
from pydantic import SecretStr, ValidationError

from orla_lg.demo.fallbacks import (
    Category,
    Classification,
    Email,
    Product,
    best_rule,
    classified_by_rules,
    corrected,
    letter,
    phrases_of,
    presentable,
    rule_fits,
    template,
)
from orla_lg.demo.tools import mailer, read_policy_yaml, read_team_descriptions, rules_in, teams_in

COMPANY = "You answer tickets for Tarn Home."
CLASSIFY = (
    "What is this ticket about: money (billing), a fault (technical), a parcel (shipping), a login (account) or a "
    "question (general)? Answer with category, product, issue, request, needs_escalation (danger, urgency)."
)

UNUSABLE = (OutputParserException, ValidationError, LengthFinishReasonError, ContentFilterFinishReasonError)
"""What a weak answer raises. A broken engine raises other things, and those are not ours to hide."""


class TicketState(TypedDict, total=False):
    """What is known of one ticket."""

    ticket: str
    file: str
    """What the desk knows of the customer; may be missing."""
    classification: Classification
    talk: list[BaseMessage]
    """The conversation about the policy, which ``reply`` goes on with."""
    rule: str
    team: str
    email: Email
    fallbacks: Annotated[list[str], operator.add]
    """The stages whose model gave no usable answer, once for each answer."""


class SupportDesk:
    """The nodes, with the two models they ask and the outbox they write to."""

    def __init__(self, light: ChatOpenAI, heavy: ChatOpenAI, outbox: Path | None, number: str = "") -> None:
        self.light, self.heavy = light, heavy
        self.name = f"Desk {number}. " if number else ""
        self.send_email = mailer(outbox)

    async def classify(self, state: TicketState) -> TicketState:
        """Read what the ticket is about."""
        ticket = state["ticket"]
        talk = [SystemMessage(self.name + CLASSIFY), HumanMessage(ticket)]
        said = await self.ask(talk, _classification_of(ticket), self.light)
        try:
            found = Classification.model_validate(said)
        except ValidationError:
            return {"classification": classified_by_rules(ticket), "fallbacks": ["classify"]}
        right = corrected(found, ticket)
        return {"classification": right, "fallbacks": [] if right == found else ["classify"]}

    async def policy_check(self, state: TicketState) -> TicketState:
        """Read the policy for the ticket and choose the rule that applies."""
        ticket, category = state["ticket"], state["classification"].category
        talk = [*self.opening(state), HumanMessage('Which policy do you need to read? Answer only {"policy": "..."}')]
        policy = await self.choose(talk, "policy", _policies_for(category))
        text = await read_policy_yaml.ainvoke({"policy": policy or category})
        rules = rules_in(text)
        talk += [_answer(policy=policy or category), HumanMessage(f"{text}\n\nWhich rule applies?")]
        rule = await self.choose(talk, "rule", rules)
        usable = rule is not None and rule_fits(rule, rules, ticket)
        fitting = rule if rule is not None and usable else best_rule(rules, ticket)
        talk.append(_answer(rule=fitting))
        missed = (policy is None) + (not usable)
        return {"rule": rules[fitting], "talk": talk, "fallbacks": ["policy_check"] * missed}

    async def route_ticket(self, state: TicketState) -> TicketState:
        """Choose the team that takes the ticket."""
        category = state["classification"].category
        talk = [*self.opening(state), HumanMessage('Call the tool: {"read_team_descriptions": true}')]
        said = await self.ask(talk, _object("tool_request", {"read_team_descriptions": {"const": True}}))
        missed = said.get("read_team_descriptions") is not True
        text = await read_team_descriptions.ainvoke({})
        talk += [_answer(read_team_descriptions=True), HumanMessage(f"{text}\n\nWhich team takes it? {category}:")]
        teams = teams_in(text)
        team = await self.choose(talk, "team", teams.values())
        return {"team": teams[category], "fallbacks": ["route_ticket"] * (missed + (team != teams[category]))}

    async def reply(self, state: TicketState) -> TicketState:
        """Write to the customer: the answer, or that a person takes over."""
        found, rule = state["classification"], state["rule"]
        about = "message to Tarn Home" if found.product == "other" else found.product
        subjects = [f"Your {about}", f"Your message: {found.issue}"]
        example = json.dumps({"subject": subjects[0], "body": f"{rule} ..."})
        prompt = f"Answer the customer{' that a colleague takes over' * found.needs_escalation}: {example}"
        said = await self.ask([*state["talk"], HumanMessage(prompt)], _letter_request(subjects))
        paragraph = presentable(str(said.get("body", "")), state["ticket"], rule)
        body = letter(paragraph or template(found, rule), team=state["team"], escalated=found.needs_escalation)
        email = Email(subject=_among(said.get("subject"), subjects) or subjects[-1], body=body)
        await self.send_email.ainvoke(email.model_dump())
        return {"email": email, "fallbacks": [] if paragraph else ["reply"]}

    def opening(self, state: TicketState) -> list[BaseMessage]:
        """Return how every talk about a ticket begins after its classification: what an engine can cache."""
        found = state["classification"]
        urgency = "urgent" if found.needs_escalation else "normal"
        known = [state["ticket"], state.get("file"), f"Ticket: {found.category}, {found.product}, {urgency}"]
        return [SystemMessage("\n\n".join([self.name + COMPANY, *filter(None, known)]))]

    async def choose(self, talk: Sequence[BaseMessage], name: str, among: Iterable[str]) -> str | None:
        """Return which of *among* the model names, or ``None`` if it names none."""
        choices = list(dict.fromkeys(among))
        said = await self.ask(talk, _object(f"choose_{name}", {name: _one_of(choices)}))
        return _among(said.get(name), choices)

    async def ask(
        self, talk: Sequence[BaseMessage], schema: dict[str, Any], llm: ChatOpenAI | None = None
    ) -> dict[str, Any]:
        """Return the model's JSON, or an empty dict where it gave none that can be read."""
        model = (llm or self.heavy).with_structured_output(schema, method="json_schema", strict=True)
        try:
            said = await model.ainvoke(list(talk))
        except UNUSABLE:
            return {}
        return said if isinstance(said, dict) else {}


def support_graph(
    light: ChatOpenAI, heavy: ChatOpenAI, outbox: Path | None, number: str = ""
) -> StateGraph[TicketState]:
    """Return the desk as a graph: *light* classifies, *heavy* does the rest; prompts begin with the desk's number."""
    desk = SupportDesk(light, heavy, outbox, number)
    graph = StateGraph(TicketState)
    graph.add_node("classify", desk.classify)
    graph.add_node("policy_check", desk.policy_check)
    graph.add_node("route_ticket", desk.route_ticket)
    graph.add_node("reply", desk.reply)
    graph.add_edge(START, "classify")
    graph.add_edge("classify", "policy_check")
    graph.add_edge("classify", "route_ticket")
    graph.add_edge(["policy_check", "route_ticket"], "reply")
    graph.add_edge("reply", END)
    return graph


def chat_model(base_url: str, model: str, api_key: str = "none") -> ChatOpenAI:
    """Return the model that the desk asks, as its author would set it up."""
    return ChatOpenAI(
        model=model,
        base_url=base_url,
        api_key=SecretStr(api_key),
        streaming=True,
        stream_usage=True,
        temperature=0,
        max_completion_tokens=160,
    )


# Prompts and answers


def _policies_for(category: Category) -> list[str]:
    return list(dict.fromkeys([category, "general"]))


def _object(title: str, properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "title": title,
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _one_of(choices: Iterable[str]) -> dict[str, Any]:
    return {"type": "string", "enum": list(dict.fromkeys(choices))}


def _classification_of(ticket: str) -> dict[str, Any]:
    """Return the schema of a classification that speaks in the ticket's own words."""
    phrases = phrases_of(ticket)
    return _object(
        "classification",
        {
            "category": _one_of(get_args(Category)),
            "product": _one_of(get_args(Product)),
            "issue": _one_of(phrases),
            "request": _one_of(phrases),
            "needs_escalation": {"type": "boolean"},
        },
    )


def _letter_request(subjects: list[str]) -> dict[str, Any]:
    return _object("send_email", {"subject": _one_of(subjects), "body": {"type": "string", "maxLength": 200}})


def _among(value: object, choices: Sequence[str]) -> str | None:
    """Return *value* if it is one of the choices: not every engine enforces a schema."""
    return value if isinstance(value, str) and value in choices else None


def _answer(**said: object) -> AIMessage:
    return AIMessage(json.dumps(said))
