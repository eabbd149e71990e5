"""The texts: a shipyard's office, whose agents read job files, look things up, and write orders.

Job files are made up sentence by sentence and begin with their number, so that no two have a prefix in common. What
a stage begins with (``BEGINNING``) is the same in every call of it: rules, and the tools once more, since the chat
templates of small models do not show them.
"""

from __future__ import annotations

import json
from random import Random
from typing import Any

TOKENS_PER_WORD = 1.35
"""Of the small models' tokenizers, for texts like these, numbers and names included."""

SHIPS = ("Gannet", "Alma Rosa", "Northern Lass", "Fulmar", "Hedda", "Saint Brendan", "Ocean Plover", "Marit")
PARTS = ("rudder stock", "bow thruster", "sea chest", "fuel manifold", "stern tube", "anchor windlass", "bilge pump")
PEOPLE = ("Solveig", "Anton", "Deirdre", "Piet", "Yara", "Magnus", "Noor", "Tomas")
FINDINGS = (
    "{who} found the {part} of the {ship} worn by {n} millimetres and marked it with yellow paint",
    "the {part} was last opened {n} weeks ago, which {who} entered in the wrong column of the log",
    "at low water {who} went below and heard the {part} knock about {n} times a minute at slow ahead",
    "the owner of the {ship} wants the {part} done before the survey on day {n}, and {who} promised nothing",
    "a spare {part} lies in shed {n}, but its papers belong to another ship and {who} is asking the maker",
    "{who} measured the {part} twice and the second reading was {n} hundredths above the first",
    "while the {part} was out the painters of the {ship} were kept waiting for {n} hours, says {who}",
    "the crane broke down on day {n} and {who} had the {part} carried over by hand, with two cuts and no delay",
)

RULES = """\
You write the work orders of Halden Yard. An order tells a foreman what to do on a ship, with what, and until when. \
Keep to these rules in every order you write.

First, safety. No order sends anybody into a tank, a void or a cofferdam without a gas test that is not older than \
four hours and the name of the person who stands at the manhole. Hot work needs a fire watch during the work and for \
one hour after it. Nothing is lifted over people. A ship in the water keeps one way of pumping ready at all times, \
and an order that takes a pump apart names the other one. If a file leaves any of this open, ask for it and write no \
order.

Second, what an order holds. It begins with the number of the job and the name of the ship. It names one part, and \
one thing to be done with it: open, measure, repair, replace, test or close. It says which drawings count, with all \
dates, and which readings are to be taken down. It names the foreman, the number of hands, and the hours they may \
take. Materials stand at the end, each with the shed where it lies, or with the word ordered and a day.

Third, what it does not hold. No guesses about causes, no blame, no prices. What the owner wishes is not an order \
until the office has signed it. What was said at the gate or on the telephone does not count unless it is in the file.

Fourth, order of work. The survey's items go before the owner's, the owner's before the yard's own. What keeps a \
berth busy goes before what does not. Two orders that need the same crane are not given for the same tide. Painting \
comes last, and never beside grinding. When a part turns out worse than its file says, the order ends there, and a \
new one is written after the surveyor has seen it.

Fifth, language. Short sentences in the present tense. Numbers with their units. Left and right are port and \
starboard, always. Do not explain the rules, and do not repeat the file."""


def _tool(name: str, description: str, **arguments: str) -> dict[str, Any]:
    properties = {key: {"type": "string", "description": said} for key, said in arguments.items()}
    parameters = {"type": "object", "properties": properties, "required": [*arguments]}
    return {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}


TOOLS = [
    _tool(
        "find_drawing", "Return number, date and sheet of the newest drawing of a part of a ship, or none.",
        ship="the ship's name as it stands in the register", part="the part, in the singular",
    ),
    _tool(
        "reserve_crane", "Reserve one of the yard's cranes for a tide, or say who has it.",
        crane="north, south or floating", tide="the tide, as day and morning or evening",
    ),
    _tool(
        "order_material", "Order what is not in any shed, and return the day on which it should come.",
        what="the material with its grade and measures", until="the last day on which it is of use",
    ),
]  # fmt: skip

BEGINNING = f"{RULES}\n\nThese tools can be called:\n{json.dumps(TOOLS)}"


def text(dice: Random, tokens: int) -> str:
    """Return sentences of about so many tokens."""
    said, words = list[str](), 0.0
    while words * TOKENS_PER_WORD < tokens:
        sentence = dice.choice(FINDINGS).format(
            who=dice.choice(PEOPLE), part=dice.choice(PARTS), ship=dice.choice(SHIPS), n=dice.randint(2, 97)
        )
        said.append(f"{sentence[0].upper()}{sentence[1:]}.")
        words += sentence.count(" ") + 1
    return " ".join(said)


def job_file(number: int, dice: Random, tokens: int) -> str:
    """Return a job's file, which begins as no other does."""
    return f"Job {number} of {dice.randint(1000, 9999)}: {text(dice, tokens)}"
