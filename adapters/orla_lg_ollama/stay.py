"""For how long a model is to stay loaded, and when Ollama must be told another time than it knows.

Ollama unloads a model that nobody used for its ``keep_alive``. A loaded model keeps the one that it was told last;
when it is loaded anew it has the server's own again. So it is told when the time changes, not with each call, and
never less than the server keeps models by itself: others may count on that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, inf

HEADROOM = 1.25
"""It is told a quarter more than is needed, so that it need not be told again for a few seconds."""

TOO_LONG = 2.0
TOLERANCE_S = 60.0
"""A time so many times and so many seconds longer than needed is taken back."""

LONGEST_S = 1e8
"""Three years; what is said to be needed longer stays as long."""


@dataclass(eq=False, slots=True)
class Stay:
    """What is needed, against what Ollama was told. Times in seconds, ``now`` monotonic."""

    needed_until_s: float = -inf
    """Until when some workflow may come back."""
    usual_s: float | None = None
    """How long the server keeps models by itself, as far as it was seen; ``None`` before it was."""
    told_s: float | None = None
    """What the model was told; ``None`` while it has the server's own."""

    def needed(self, keep_s: float, now: float) -> None:
        """Note that a workflow whose call ended may come back within *keep_s*."""
        self.needed_until_s = max(self.needed_until_s, now + min(keep_s, LONGEST_S))

    def saw(self, left_s: float | None) -> None:
        """Note in how many seconds the model would leave; ``None`` where it is not loaded.

        What is left is no more than the server's own time, and all of it right after a call.
        """
        if left_s is None:
            self.told_s = None
        elif self.told_s is None:
            self.usual_s = max(self.usual_s or 0.0, left_s)

    def to_tell(self, now: float) -> int | None:
        """Return the ``keep_alive`` to tell, in seconds; ``None`` where what it knows will do."""
        if self.usual_s is None:
            return None
        needed_s = max(0.0, self.needed_until_s - now)
        knows_s = self.usual_s if self.told_s is None else self.told_s
        if needed_s <= knows_s <= max(TOO_LONG * needed_s, self.usual_s) + TOLERANCE_S:
            return None
        return ceil(max(HEADROOM * needed_s, self.usual_s))
