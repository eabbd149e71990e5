"""The texts: a shipyard's office, whose agents read job files, look things up, and write orders.

Job files are made up sentence by sentence and begin with their number, so that no two have a prefix in common. What
a stage begins with (``BEGINNING``) is the same in every call of it: rules, and the tools once more, since the chat
templates of small models do not show them.
"""

from __future__ import annotations

import json
from pathlib import Path
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

RULES = Path(__file__).with_name("rules.txt").read_text(encoding="utf-8").strip()


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
