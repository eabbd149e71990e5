"""A support desk of five stages: the texts, and the graph."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import START, StateGraph

from bench.lib.client import ask
from bench.lib.engines import Message
from bench.lib.workflows import Session, State

After = Callable[[], Awaitable[None]] | None
STAGES = ("classify", "check", "draft", "review", "reply")
ANSWER_TOKENS = 24
LOOK_UP_LEAST_S, LOOK_UP_MEAN_S, LOOK_UP_MOST_S = 0.2, 1.0, 3.0
"""What a stage looks up before it asks takes so long; exponential, clipped."""

POLICY = Path(__file__).with_name("policy.txt").read_text(encoding="utf-8").strip()
CASES = (
    ("a return", "the {item} is too small for us and I would like to send it back, it is still in its bag"),
    ("a parcel", "the {item} should have come last week and the tracking has not moved since it left your store"),
    ("a repair", "the zip of the {item} came off on the second night and we had to sleep with the door open"),
    ("a refund", "I sent the {item} back long ago and I still do not see the money, please tell me what is going on"),
    ("a stove", "the {item} flares up when it is lit and there is a smell of fuel around it, my son does not dare"),
)
ITEMS = (
    "Ridge 2 tent", "Ridge 4 tent", "Fell 45 pack", "Fell 70 pack", "Ember stove", "Moor sleeping bag", "Tarn mat",
)  # fmt: skip
NAMES = ("Ada Berg", "Jonas Falk", "Mira Conti", "Tom Osei", "Lena Horn", "Paul Weiss", "Ines Roth", "Karl Lund")
TOWNS = ("Bergen", "Graz", "Leiden", "Turku", "Aarhus", "Ghent", "Trieste", "Cork")
ASKED = (
    "Name the kind of case and how urgent it is, in one line.",
    "Say which rules apply to this case, and what they allow.",
    "Write a draft of the answer to the customer.",
    "Say what in the draft is against the rules or the facts.",
    "Write the final answer to the customer.",
)


def tickets(count: int, every_s: float, seed: int) -> list[Session]:
    """Return so many cases; they arrive as a Poisson process, with *every_s* between two on the mean."""
    dice, begin_s, made = Random(seed), 0.0, list[Session]()
    for number in range(count):
        waits_s = [0.0, *(_look_up_s(dice) for _ in STAGES[1:])]
        made.append(Session(begin_s, _said(1000 * (seed + 1) + number, dice), tuple(waits_s)))
        begin_s += dice.expovariate(1 / every_s)
    return made


def _look_up_s(dice: Random) -> float:
    return min(LOOK_UP_MOST_S, max(LOOK_UP_LEAST_S, dice.expovariate(1 / LOOK_UP_MEAN_S)))


def _said(case: int, dice: Random) -> tuple[str, ...]:
    """Return the words of a case: its ticket, its file, and what the stages find."""
    kind, text = dice.choice(CASES)
    item, name, town = dice.choice(ITEMS), dice.choice(NAMES), dice.choice(TOWNS)
    order, price, day = dice.randrange(10_000, 99_999), dice.randrange(40, 480), dice.randrange(1, 28)
    ticket = f"Case {case}. {name} from {town} writes: {text.format(item=item)}. My order has the number {order}."
    found = (
        ticket,
        f"File of order {order}: one {item} at {price}.00 euros, paid by card, sent to {town} on {day} March with "
        f"carrier number {dice.randrange(10**8, 10**9)}; {dice.randrange(0, 4)} earlier orders, "
        f"{dice.randrange(0, 2)} favours in this year.",
        f"Notes on {name}: prefers {dice.choice(('letters', 'mail', 'calls'))}, answered {kind} "
        f"{dice.randrange(2, 60)} weeks ago, {dice.choice(('was content', 'was not content', 'did not answer'))}.",
        f"Stock of {item}: {dice.randrange(0, 40)} in the store, {dice.randrange(0, 9)} to lend, the next delivery "
        f"on {dice.randrange(1, 28)} April; a repair takes {dice.randrange(1, 5)} weeks at present.",
        f"The second person says: {dice.choice(('agreed', 'make it shorter', 'name the amount', 'add the date'))}.",
    )
    return tuple(f"{what}\n{asked}" for what, asked in zip(found, ASKED, strict=True))


def opening(ticket: Session) -> list[Message]:
    """Return a ticket's first prompt."""
    return [{"role": "system", "content": POLICY}, {"role": "user", "content": ticket.said[0]}]


def graph_of(model: ChatOpenAI, cases: Sequence[Session], after: After = None) -> Any:
    """Return the support desk, five nodes in a row; *after* is done after every call, within its node."""
    stages = [(stage, _stage(model, cases, number, after)) for number, stage in enumerate(STAGES)]
    return StateGraph(State).add_sequence(stages).add_edge(START, STAGES[0]).compile()


def _stage(model: ChatOpenAI, cases: Sequence[Session], stage: int, after: After) -> Any:
    # Answers of one length: otherwise arms would differ by what the model happens to say.
    length: dict[str, Any] = {"max_tokens": ANSWER_TOKENS, "extra_body": {"ignore_eos": True}}

    async def run(state: State) -> dict[str, Any]:
        case, number = cases[state["number"]], state["number"]
        await asyncio.sleep(case.waits_s[stage])
        history = [*(state["history"] or [SystemMessage(POLICY)]), HumanMessage(case.said[stage])]
        seen, answer = await ask(model, history, session=number, number=stage, **length)
        if after is not None:
            await after()
        return {"history": [*history[len(state["history"]) :], AIMessage(answer)], "seen": [seen]}

    return run
