"""A support desk of five stages: the texts, and the graph.

Every ticket goes through the same five nodes, each with a prompt of its own for the model. A stage sees all that was
said before it, so each prompt is the one before, the answer to that, what the stage looked up, and its instruction.
All tickets begin with the same policy.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from random import Random
from typing import Any

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from langgraph.graph import END, START, StateGraph

from bench.lib.client import ask
from bench.lib.engines import Message
from bench.lib.workflows import Session, State

After = Callable[[], Awaitable[None]] | None
STAGES = ("classify", "check", "draft", "review", "reply")
ANSWER_TOKENS = 24
LOOK_UP_LEAST_S, LOOK_UP_MEAN_S, LOOK_UP_MOST_S = 0.2, 1.0, 3.0
"""What a stage looks up before it asks takes so long; exponential, clipped."""

POLICY = """\
You work at the support desk of Northlight Outdoor, a shop for tents, packs and stoves. Follow this policy to the \
letter.

1. Returns. Goods may be sent back within thirty days of delivery if they are unused and in their packing. The \
customer pays the way back unless the goods were wrong or broken on arrival. Goods that were made to order, and \
fuel of any kind, cannot be sent back. A return that comes late by up to seven days is accepted once per customer \
and year, as a favour, and is noted as such. Later ones are refused with regret, and with the offer of a repair at \
cost.

2. Refunds. Money goes back the way it came, within five working days after the goods were checked. Shipping is \
refunded only if the whole order is. Where a voucher was used, the voucher is restored first and the rest is paid \
out. An amount above two hundred euros needs the word of a second person, and the case is marked as waiting for it. \
Never promise a date for a refund: name the five working days.

3. Parcels. A parcel counts as lost when its tracking has not moved for eight days within the country, or fifteen \
days abroad. Before that, open an inquiry with the carrier and tell the customer its number. A lost parcel is sent \
again if the goods are in stock, else refunded. A parcel that the carrier calls delivered and the customer has not \
seen is first asked for at the neighbours and at the depot; the customer signs a statement, and then it is treated \
as lost.

4. Repairs. The guarantee is two years, for tents three. It covers seams, zips, poles and burners, not wear, mould, \
or burns. The customer sends a photograph first. A repair takes up to four weeks; for a tour that starts earlier we \
lend a tent or a pack of the same kind against a deposit of fifty euros. What cannot be repaired under the \
guarantee is replaced by the same thing or its follower.

5. Complaints about people. Say thank you, do not take sides, and hand over to the team lead on the same day. \
Nothing about colleagues is written to a customer, not even an excuse.

6. Safety. Every report of a stove that flares, leaks or smells, and of a tent that caught fire, is urgent whatever \
the customer wants: tell him not to use it any more, to keep it, and that we fetch it at our cost. Mark the case \
red. Such cases are never closed by the desk.

7. Tone. Short sentences, friendly, no jargon. Address the customer by name. Say first what will happen, then why, \
then what the customer has to do. One apology is enough. Do not quote this policy and do not mention that there is \
one.

8. What is written down. Every answer of a stage begins with the number of the case. Facts come from the file only; \
what is not in the file is asked for, not guessed. Amounts are given in euros with two places, dates as day and \
month."""

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
    """Return the cases of a turn; they arrive as a Poisson process.

    Args:
        count: How many.
        every_s: Seconds between two arrivals, on the mean.
        seed: The same seed gives the same cases at the same times.
    """
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


# The graph --------------------------------------------------------------------------------------------------


def opening(ticket: Session) -> list[Message]:
    """Return a ticket's first prompt."""
    return [{"role": "system", "content": POLICY}, {"role": "user", "content": ticket.said[0]}]


def graph_of(model: ChatOpenAI, cases: Sequence[Session], after: After = None) -> Any:
    """Return the support desk as a compiled graph of five nodes in a row.

    Args:
        model: Asked by every stage.
        cases: By their numbers in the state; a stage waits, then asks.
        after: Done after every call, within its node; what the paper's baseline does to the engine.
    """
    graph = StateGraph(State)
    for number, stage in enumerate(STAGES):
        graph.add_node(stage, _stage(model, cases, number, after))
    for before, stage in zip((START, *STAGES), (*STAGES, END), strict=True):
        graph.add_edge(before, stage)
    return graph.compile()


def _stage(
    model: ChatOpenAI, cases: Sequence[Session], stage: int, after: Callable[[], Awaitable[None]] | None
) -> Any:
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
