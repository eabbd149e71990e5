"""What came of the checks."""

from __future__ import annotations

import unittest
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any


class Status(StrEnum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "failed"
    SKIPPED = "skipped"


class NotApplicable(unittest.SkipTest):
    """A check does not apply here; pytest and unittest show it as skipped."""


class NonConforming(AssertionError):
    """An adapter does not do what it must."""


@dataclass(frozen=True, slots=True)
class Result:
    """One check's end."""

    name: str
    asserts: str
    """What was checked, in one sentence."""
    status: Status
    seconds: float
    message: str = ""
    """What was seen instead, or why the check does not apply."""

    def __str__(self) -> str:
        said = f"  {self.message}" if self.message else ""
        return f"{self.status:<7}  {self.seconds:5.1f} s  {self.name}{said}"


@dataclass(frozen=True, slots=True)
class Report:
    """One adapter's results; printing it gives a table."""

    adapter: str
    engine: str
    """Where the engine is, and its version."""
    results: tuple[Result, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing failed and something passed."""
        return not self.failures and any(result.status is Status.PASSED for result in self.results)

    @property
    def failures(self) -> Sequence[Result]:
        """The failed checks."""
        return [result for result in self.results if result.status is Status.FAILED]

    def named(self, name: str) -> Result:
        """Return one check's result."""
        return next(result for result in self.results if result.name == name)

    def raise_for_failures(self) -> None:
        """Raise ``NonConforming`` naming every failed check, if any did."""
        if not self.ok:
            lines = [f"{result.name}: {result.message}" for result in self.failures] or ["nothing could be checked"]
            raise NonConforming(f"{self.adapter} does not conform:\n  " + "\n  ".join(lines))

    def asdict(self) -> dict[str, Any]:
        """Return the report as plain values."""
        return {"ok": self.ok, **asdict(self)}

    def __str__(self) -> str:
        counts = ", ".join(f"{sum(result.status is status for result in self.results)} {status}" for status in Status)
        seconds = sum(result.seconds for result in self.results)
        head = f"{self.adapter} on {self.engine}"
        return "\n".join([head, *(f"  {result}" for result in self.results), f"{counts} in {seconds:.1f} s"])
