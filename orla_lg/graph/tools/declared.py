"""Which tools were said to be safe: repeatable, without outside effect, may run beside other tools and twice a call.

It is said by name (``wrap(tools_safe={"search"})``), on the tool (``tool.metadata["orla"] = {"safe": True}``), or, if
the user says that foreign servers are to be believed, by MCP's ``readOnlyHint`` (``wrap(tools_safe_mcp=True)``). What
nobody declared never starts early.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Set
from dataclasses import dataclass
from typing import Any, Self

from orla_lg.core.boundary import checked
from orla_lg.graph.structure import AnyPregel


@dataclass(frozen=True, slots=True)
class DeclaredTools:
    """What ``wrap`` was told.

    Args:
        names: Of tools that are safe.
        believes_mcp: Whether MCP's ``readOnlyHint`` is believed.
        splits: Whether the next prompt is prefilled while tools still run.
    """

    names: frozenset[str] = frozenset()
    believes_mcp: bool = False
    splits: bool = False

    @classmethod
    def of(cls, names: Collection[str], *, believes_mcp: bool, splits: bool) -> Self:
        """Return what ``tools_safe``, ``tools_safe_mcp`` and ``split_prompts`` mean.

        Raises:
            ConfigError: They are not what they should be.
        """
        listed = sorted(names, key=str) if isinstance(names, Set) else names
        said = checked.texts("tools_safe", listed)
        checked.flag("tools_safe_mcp", believes_mcp)
        checked.flag("split_prompts", splits)
        return cls(frozenset(said), believes_mcp, splits)


NOTHING_DECLARED = DeclaredTools()


@dataclass(frozen=True, eq=False)
class SafeTools:
    """The tools of one wrapped graph that may start early."""

    names: frozenset[str]
    splits: bool = False

    def offered(self, body: Mapping[str, Any]) -> Collection[str]:
        """Return the names of the safe tools that a request offers to its model."""
        return ()


def safe_tools(graph: AnyPregel, declared: DeclaredTools) -> SafeTools | None:
    """Return the tools of *graph* that are safe; ``None`` where there are none and its prompts are not split."""
    return SafeTools(declared.names, declared.splits) if declared.names or declared.splits else None
