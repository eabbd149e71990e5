"""Step 1, identify: who calls. Pure functions from LangGraph's names to ours; no LangGraph here."""

from __future__ import annotations

from dataclasses import dataclass

NAMESPACE_SEPARATOR = "|"
ID_SEPARATOR = ":"


@dataclass(frozen=True, slots=True)
class Identity:
    """Who makes a call. ``workflow`` shares KV cache, ``run`` is one execution, ``stage`` one node."""

    workflow: str
    """The thread, else the run, else the call itself."""
    run: str | None = None
    """The root graph's run id; ``None`` outside any graph we follow."""
    stage: str = ""
    """The node as ``subgraph|node``; empty outside a graph."""
    step: int | None = None
    """LangGraph's superstep."""
    namespace: str = ""
    """The checkpoint namespace with its ids: one execution of one node."""
    thread: bool = False
    """The workflow is a thread, so it may come back after its run."""
    identified: bool = True
    """False when a graph's context was lost on the way (a raw thread)."""

    @property
    def voice(self) -> str:
        """Whose answers its prompts may repeat: its workflow's. Calls outside of any graph speak with one voice."""
        return "" if self.run is None else self.workflow


def stage_key(checkpoint_namespace: str) -> str:
    """Return a checkpoint namespace without what differs from run to run.

    Task ids go (``sub:1f…|node:2a…`` → ``sub|node``), and so do the counters that LangGraph puts between
    a node and a graph called more than once inside it (``node|1|agent`` → ``node|agent``).
    """
    parts = (part.split(ID_SEPARATOR, 1)[0] for part in checkpoint_namespace.split(NAMESPACE_SEPARATOR))
    return NAMESPACE_SEPARATOR.join(part for part in parts if part and not part.isdigit())


def standalone(call_id: str, *, identified: bool = True) -> Identity:
    """Return the identity of a call outside any graph: a workflow of its own."""
    return Identity(workflow=f"call-{call_id}", identified=identified)
