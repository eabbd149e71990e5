"""Step 1, identify: who calls. Pure functions from LangGraph's names to ours; no LangGraph here."""

from __future__ import annotations

from dataclasses import dataclass

ANY_STAGE = "*"
NAMESPACE_SEPARATOR = "|"
ID_SEPARATOR = ":"

TENANT_MARK = "tenant="
"""What a workflow's key begins with unless it is a name as it stands; then come the tenant's length, tenant, name."""


def workflow_key(name: str, tenant: str | None = None) -> str:
    """Return the key of a tenant's workflow: what caches, claims and slots are kept by.

    No two pairs of tenant and name have one key, whatever characters they hold: a tenant's length stands before it,
    and a name without a tenant that looks like a key is written as one. Without a tenant any other name is its own
    key.
    """
    if tenant:
        return f"{TENANT_MARK}{len(tenant)}:{tenant}{name}"
    return f"{TENANT_MARK}0:{name}" if name.startswith(TENANT_MARK) else name


def tenant_of(key: str) -> str:
    """Return the tenant of a workflow's key; empty for none."""
    return _parted(key)[0] if key.startswith(TENANT_MARK) else ""


def workflow_name(key: str) -> str:
    """Return the name in a workflow's key: a thread's id as its user knows it, or a run's or call's."""
    return _parted(key)[1] if key.startswith(TENANT_MARK) else key


def _parted(key: str) -> tuple[str, str]:
    length, _, rest = key.removeprefix(TENANT_MARK).partition(":")
    return rest[: int(length)], rest[int(length) :]


@dataclass(frozen=True, slots=True)
class Identity:
    """Who makes a call. ``workflow`` shares KV cache, ``run`` is one execution, ``stage`` one node."""

    workflow: str
    """The key (``workflow_key``) of the tenant's thread, else run, else the call itself; users see its ``name``."""
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
    def name(self) -> str:
        """The workflow as users know it: the thread's id, else the run's, else one made of the call's."""
        return workflow_name(self.workflow)

    @property
    def tenant(self) -> str:
        """The tenant of the workflow; empty for none."""
        return tenant_of(self.workflow)

    @property
    def prompt_owner(self) -> str:
        """The workflow that got the answers that its prompts may repeat; one for all calls outside of any graph."""
        return "" if self.run is None else self.workflow


def standalone(call_id: str, *, identified: bool = True) -> Identity:
    """Return the identity of a call outside any graph: a workflow of its own."""
    return Identity(workflow=f"call-{call_id}", identified=identified)
