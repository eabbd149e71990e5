"""What a records file is told of tools that began early in vain, and of those that did not begin early."""

from __future__ import annotations

import time
from functools import partial

from orla_lg.core.background import is_collecting
from orla_lg.core.serving import Serving
from orla_lg.graph.tools.early.reasons import NotBegun
from orla_lg.graph.tools.early.starts import AskingCall, EarlyStart
from orla_lg.wires.watching import Late


def note_in_vain(serving: Serving, start: EarlyStart, why: str) -> None:
    """Note a start whose result no call got; ``DropReason``, or ``failed``."""
    if serving.journal is None:
        return
    if is_collecting():  # a dropped run is collected, perhaps amid what the journal does
        serving.background.call_later(0.0, partial(note_in_vain, serving, start, why))
        return
    asking, now_s = start.asking, time.monotonic()
    serving.journal.dropped_tool(
        asking.run, asking.call, start.stage, start.tool.name, why, began_before_s=now_s - (start.began_s or now_s),
        ran_s=start.ran_s,
    )  # fmt: skip


def note_not_begun(serving: Serving, asking: AskingCall, name: str, why: NotBegun | Late) -> None:
    """Note a tool that an answer asked for and that did not begin before its turn."""
    if serving.journal is not None:
        serving.journal.late_tool(asking.run, asking.call, asking.stage, name, why)
