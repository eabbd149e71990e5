"""What an ``OrlaSaver`` tells the core."""

from __future__ import annotations

from collections.abc import Sequence

from orla_lg.core.record import CallEvent, Happening
from orla_lg.graph.context import Core, identify, origin


class Signals:
    """What an ``OrlaSaver`` tells; nothing when orla_lg is disabled."""

    def __init__(self, core: Core) -> None:
        self.core = core

    def thread_deleted(self, thread_id: str, tenant: str | None = None) -> None:
        """Free what a thread kept in any cache: a thread of *tenant*, else of the running node's, else of none."""
        if not self.core.disabled:
            if tenant is None and (here := origin()) is not None:
                tenant = identify(here, self.core, "")[0].tenant
            self.core.serving.progress.thread_deleted(thread_id, tenant)

    def stages_next(self, thread_id: str | None, checkpoint_ns: str, stages: Sequence[str]) -> None:
        """Tell listeners which stages come next."""
        records = self.core.serving.records
        if records.heard and not self.core.disabled:
            event = CallEvent(
                Happening.STAGES_NEXT,
                self.core.serving.clock(),
                thread_id or "",
                stage=checkpoint_ns,
                detail=", ".join(stages),
            )
            records.tell(event)
