"""What the desk does when a small model's answer cannot be used: checks, keyword rules, template letters.

Nothing here calls a model. A desk with a strong model hardly ever comes here; with the tiny one that the
demo brings along it does, and says how often.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

from pydantic import BaseModel, Field

Category = Literal["billing", "technical", "shipping", "account", "general"]
Product = Literal["Lumo lamp", "Brisa purifier", "Volta charger", "Keyra lock", "other"]

_SIGNS: Mapping[str, str] = {
    "billing": r"charged|refund|payment|paid|invoice|billed|bill|discount|amount|euros|price",
    "technical": r"error|fix|stops|stopped|broken|hot|burn\w*|smoke|smells|offline|pair|flickers|repair|not open",
    "shipping": r"parcel|deliver\w*|arrived|shipped|ships|missing from|cracked|tracking",
    "account": r"log in|login|password|account|personal data|email address|sign in",
}
_ESCALATE = r"lawyer|legal|court|consumer office|smoke|burn\w*|danger\w*|urgent|injur\w*|third time|locked out"
_STOP_WORDS = frozenset(
    """about after again also because before could customer does from have hello help into issue just like more need
    only order please product request should since still that their them then there they this ticket time want week
    what when where which with would write your""".split()  # noqa: SIM905  a list of quotes would be harder to read
)


class Classification(BaseModel):
    """What a ticket is about."""

    category: Category
    product: Product
    issue: str = Field(min_length=4, max_length=60)
    request: str = Field(min_length=4, max_length=60)
    needs_escalation: bool


class Email(BaseModel):
    """What the customer gets."""

    subject: str = Field(min_length=4, max_length=60)
    body: str = Field(min_length=60, max_length=1200)


# Classification


def _signs_of(ticket: str) -> dict[str, int]:
    return {name: len(re.findall(rf"\b(?:{signs})\b", ticket, re.I)) for name, signs in _SIGNS.items()}


def category_of(ticket: str) -> Category:
    """Return the category whose signs are most frequent in the ticket."""
    counts = _signs_of(ticket)
    best = max(counts, key=lambda name: counts[name])
    return cast("Category", best if counts[best] else "general")


def must_escalate(ticket: str) -> bool:
    """Whether the ticket speaks of danger, the law, urgency or repeated complaints."""
    return re.search(rf"\b(?:{_ESCALATE})\b", ticket, re.I) is not None


def product_of(ticket: str) -> Product:
    """Return the product that the ticket names first."""
    named = [product for product in get_args(Product) if product.split()[0] in ticket]
    return cast("Product", min(named, key=lambda product: ticket.index(product.split()[0]), default="other"))


def phrases_of(ticket: str, words_each: int = 6) -> list[str]:
    """Return how the sentences of a ticket begin: what a classification may quote."""
    sentences = [part.split() for part in re.split(r"(?<=[.!?])\s+", ticket.strip())]
    long_enough = [sentence for sentence in sentences if len(sentence) > 2] or sentences
    phrases = [" ".join(sentence[:words_each]).rstrip(" ,;:.!?")[:60] for sentence in long_enough]
    return [phrase for phrase in phrases if len(phrase) >= 4] or ["an open question"]


def classified_by_rules(ticket: str) -> Classification:
    """Return a classification from keywords and the ticket's own words."""
    phrases = phrases_of(ticket)
    asks = [phrase for phrase in phrases if re.match(r"(please|can|how|what|where|do|does|is)\b", phrase, re.I)]
    return Classification(
        category=category_of(ticket),
        product=product_of(ticket),
        issue=phrases[0],
        request=asks[-1] if asks else phrases[-1],
        needs_escalation=must_escalate(ticket),
    )


def corrected(found: Classification, ticket: str) -> Classification:
    """Return a model's classification with every field replaced that cannot be right for this ticket."""
    ruled, quotable = classified_by_rules(ticket), phrases_of(ticket)
    return Classification(
        category=found.category if _signs_of(ticket).get(found.category) else ruled.category,
        product=found.product if found.product == "other" or found.product.split()[0] in ticket else ruled.product,
        issue=found.issue if found.issue in quotable else ruled.issue,
        request=found.request if found.request in quotable else ruled.request,
        needs_escalation=ruled.needs_escalation,
    )


def words(text: str) -> set[str]:
    """Return the stems of the words in *text* that say something."""
    found = re.findall(r"[a-z]{4,}", text.lower())
    return {word[:5] for word in found if word not in _STOP_WORDS}


# Policy


def best_rule(rules: Mapping[str, str], ticket: str) -> str:
    """Return the name of the rule that shares most words with the ticket."""
    told = words(ticket)
    return max(rules, key=lambda name: len(words(f"{name.replace('_', ' ')} {rules[name]}") & told))


def rule_fits(name: str, rules: Mapping[str, str], ticket: str) -> bool:
    """Whether a rule speaks of what the ticket speaks of, half as much as the best rule does or more."""
    told = words(ticket)
    shared = {each: len(words(f"{each.replace('_', ' ')} {rule}") & told) for each, rule in rules.items()}
    return name in shared and 2 * shared[name] >= max(shared.values())


# The letter

_UNFIT = re.compile(r"[\[\]{}<>\\|*_\"]|https?:|@|\w:\s")
"""Placeholders, markup, addresses and labels: nothing that belongs in a letter's sentence."""


def presentable(text: str, ticket: str, rule: str) -> str | None:
    """Return the sentences at the start of *text* that a customer may read; ``None`` where that is too little."""
    kept: list[str] = []
    for sentence in re.findall(r"[^.!?]+[.!?]", " ".join(text.split())):
        if not _fit(sentence, kept, f"{ticket} {rule}"):
            break
        kept.append(sentence.strip())
    body = " ".join(kept)
    tells_the_rule = len(words(body) & words(rule)) >= 0.7 * len(words(rule))
    return body if len(body) >= 60 and tells_the_rule else None


def _fit(sentence: str, before: list[str], source: str) -> bool:
    """Whether a sentence is clean, of this case, free of invented numbers, and no loop."""
    known_numbers = set(re.findall(r"\d+", source))
    invented = set(re.findall(r"\d+", sentence)) - known_numbers
    on_topic = len(words(sentence) & words(source)) >= 2
    repeats = any(len(words(sentence) & words(each)) > 0.6 * len(words(sentence)) for each in before)
    return not (_UNFIT.search(sentence) or invented or repeats or _loops(sentence)) and on_topic


def _loops(text: str) -> bool:
    """Whether three words in a row come twice: language models loop there first."""
    tokens = re.findall(r"\w+", text.lower())
    runs = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(runs)) < len(runs)


def template(found: Classification, rule: str) -> str:
    """Return a paragraph that is always right: what was understood, and what the policy says."""
    about = "your question" if found.product == "other" else f"the {found.product}"
    return f"We have read what you wrote about {about}. {rule}"


def letter(paragraph: str, *, team: str, escalated: bool) -> str:
    """Return the whole email around a paragraph."""
    if escalated:
        after = f"Your case is now with a person in our {team} team, who will write to you today."
    else:
        after = f"If anything is still open, just answer this email; it reaches our {team} team."
    return f"Dear customer,\n\n{paragraph}\n\n{after}\n\nKind regards\nTarn Home Support"
