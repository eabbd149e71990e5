"""What the desk knows of a customer: a file of orders and earlier letters, made up, another one for each ticket.

No two files begin alike, as no two customers do, so an engine shares nothing between tickets.
"""

from __future__ import annotations

import random

LETTERS = 2
"""Earlier letters in a file; with the orders some 170 tokens."""

_NAMES = (
    "Anna Berg,Jonas Okafor,Mira Lind,Tomas Hale,Ines Faro,Peter Voss,Lea Brandt,Samir Nasser,Olga Petrov,Ruth Kamp"
)
_PLACES = "Tarnby,Holm,Ostvik,Lindau,Sellin,Marbach,Dornum,Aalen"
_THINGS = "Lumo lamp,Brisa purifier,Volta charger,Keyra lock,filter set,spare shade,charging cable,mounting plate"
_WAYS = "card,invoice,bank transfer"
_MONTHS = "January,February,March,April,May,June,July,August,September,October,November,December"
_LETTERS = (
    ("asked whether the {thing} may stay outside during winter.",
     "We wrote that it is made for rooms, and that frost voids the warranty."),
    ("said that the manual of the {thing} was missing from the box.",
     "We sent the manual by email and added a printed one to the next parcel."),
    ("wanted the {thing} in another colour after seeing it at a friend's house.",
     "We exchanged it, and the customer paid the postage back to us."),
    ("found a scratch on the {thing} and sent two photos of it.",
     "We gave a discount of ten percent, with which the customer was content."),
    ("asked for the invoice of the {thing} with the name of the firm on it.",
     "We corrected the invoice on the same day and sent a copy."),
    ("complained that the parcel with the {thing} was left at a neighbour's door.",
     "We apologised and noted that parcels are to be handed over in person."),
    ("could not pair the {thing} with a new phone after the old one was lost.",
     "We reset the pairing from here, and the customer confirmed that it worked."),
    ("asked how much power the {thing} draws while it is not in use.",
     "We sent the data sheet, page four of which answers that."),
    ("wrote that the {thing} hums at night, though softly.",
     "We offered a visit by the workshop, which the customer declined."),
    ("thanked us for the quick delivery of the {thing} before the holidays.",
     "We said that we were glad of it, and closed the letter."),
)  # fmt: skip


def customer_file(number: int, letters: int = LETTERS) -> str:
    """Return the file of the customer who wrote the ticket with this number; the same number, the same file."""
    draw = random.Random(number)
    things = _THINGS.split(",")
    lines = [
        f"Customer {draw.randrange(10_000, 100_000)}: {draw.choice(_NAMES.split(','))}, "
        f"{draw.choice(_PLACES.split(','))}, with us since {draw.randrange(2015, 2024)}.",
        "Orders:",
    ]
    lines += [
        f"- {draw.choice(things)}, {draw.randrange(19, 240)} euros, paid by {draw.choice(_WAYS.split(','))}"
        for _ in range(4)
    ]
    lines.append("Earlier letters:")
    for asked, answered in draw.sample(_LETTERS, letters):
        lines.append(f"- In {draw.choice(_MONTHS.split(','))} {draw.randrange(2021, 2026)} the customer "
                     f"{asked.format(thing=draw.choice(things))} {answered}")  # fmt: skip
    return "\n".join(lines)
