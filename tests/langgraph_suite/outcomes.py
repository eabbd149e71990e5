"""How the tests of two runs ended, and what that says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

AGAIN = 3
"""So often does a test that failed wrapped run on its own."""


@dataclass
class Outcomes:
    """How the tests of one run ended, by name."""

    ended: dict[str, str] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    collected: int = 0
    early: Counter[str] = field(default_factory=Counter)
    """What became of the tools that were started early, over all processes."""

    @classmethod
    def read(cls, lines: Iterable[str]) -> Outcomes:
        """Return what the plugin noted; a test with a phase that failed has failed."""
        outcomes = cls()
        for line in lines:
            if not line.endswith("\n"):  # still being written
                continue
            noted = json.loads(line)
            if "collected" in noted:
                outcomes.collected = noted["collected"]
            elif "early" in noted:
                outcomes.early.update(noted["early"])
            elif outcomes.ended.get(noted["test"]) != "failed":
                outcomes.ended[noted["test"]] = noted["outcome"]
                outcomes.why[noted["test"]] = noted["why"]
        return outcomes

    def count(self, outcome: str) -> int:
        """Return how many tests ended so."""
        return sum(each == outcome for each in self.ended.values())


@dataclass
class Comparison:
    """What wrapping changed."""

    meant: dict[str, str] = field(default_factory=dict)
    """Tests that differ by design, and the cause."""
    unlucky: list[str] = field(default_factory=list)
    """Tests that failed wrapped once and then passed each time."""
    differing: dict[str, str] = field(default_factory=dict)
    """Tests that differ, and how they fail."""


def suspects(bare: Outcomes, wrapped: Outcomes) -> list[str]:
    """Return the tests that passed bare and did not pass wrapped."""
    return [test for test, outcome in bare.ended.items() if outcome == "passed" != wrapped.ended.get(test)]


def cause_of(test: str, by_design: Mapping[str, str]) -> str | None:
    """Return why a test is meant to differ; ``None`` if it is not."""
    return next((cause for pattern, cause in by_design.items() if re.search(pattern, test)), None)


def compare(bare: Outcomes, wrapped: Outcomes, again: Sequence[Outcomes], by_design: Mapping[str, str]) -> Comparison:
    """Return what wrapping changed, given how the suspects ended when they ran *again*."""
    compared = Comparison()
    for test in suspects(bare, wrapped):
        cause = cause_of(test, by_design)
        failed = [run for run in again if run.ended.get(test) != "passed"]
        if cause is not None:
            compared.meant[test] = cause
        elif again and not failed:
            compared.unlucky.append(test)
        else:
            compared.differing[test] = next(iter(failed), wrapped).why.get(test) or "it did not run to its end"
    return compared


def table(bare: Outcomes, wrapped: Outcomes, compared: Comparison) -> str:
    """Return the outcome as a table, and below it the tests that differ, by cause."""
    lines = [f"{'':<10}{'bare':>8}{'wrapped':>9}"]
    lines += [
        f"{name:<10}{bare.count(name):>8,}{wrapped.count(name):>9,}" for name in ("passed", "failed", "skipped")
    ]
    if wrapped.early:
        told = ", ".join(f"{count:,} {what}" for what, count in wrapped.early.items())
        lines += ["", f"tools that were started early: {told}"]
    if compared.unlucky:
        lines += ["", f"{len(compared.unlucky)} failed wrapped once and passed {AGAIN} times on their own:"]
        lines += [f"  {test}" for test in compared.unlucky]
    for title, causes in (("differ by design", compared.meant), ("DIFFER", compared.differing)):
        for cause, many in Counter(_first_line(cause) for cause in causes.values()).most_common():
            lines += ["", f"{many} {title}: {cause}"]
            lines += [f"  {test}" for test, each in causes.items() if _first_line(each) == cause]
    if not compared.differing:
        lines += ["", "Nothing differs." if not compared.meant else "Nothing else differs."]
    return "\n".join(lines)


def _first_line(why: str) -> str:
    return why.strip().partition("\n")[0][:160]
