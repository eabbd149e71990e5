"""What an account is outside its process: what was spent, and how long ago."""

from __future__ import annotations

from dataclasses import dataclass

from orla_lg.core.limits.usage import NOTHING, Amount, Key, UsageAccount, window_of


@dataclass(frozen=True, slots=True)
class KeptAccount:
    """One account, by ages and not by instants: two processes have no monotonic clock in common."""

    key: Key
    """The layer's key is a text."""
    per_s: float | None
    spent: Amount
    slices: tuple[tuple[float, Amount], ...] = ()
    """Ages in seconds, the oldest first, and what was spent then."""

    @property
    def is_over(self) -> bool:
        """Whether nothing of it counts any more."""
        return self.per_s is not None and all(age_s >= window_of(self.per_s) for age_s, _ in self.slices)


def keep(key: Key, account: UsageAccount, now: float) -> KeptAccount:
    """Return what is kept of an account."""
    slices = tuple((now - begun_s, amount) for begun_s, amount in account.slices)
    return KeptAccount(key, account.per_s, account.spent, slices)


def restored(kept: KeptAccount, now: float) -> UsageAccount:
    """Return the account again; what it had promised is promised again by those calls that go on."""
    account = UsageAccount(per_s=kept.per_s, spent=kept.spent)
    if kept.per_s is not None:
        slices = sorted(((now - age_s, amount) for age_s, amount in kept.slices), key=lambda each: each[0])
        account.slices.extend(slices)
        account.spent = NOTHING
        for _, amount in slices:
            account.spent = account.spent.plus(amount)
    return account
