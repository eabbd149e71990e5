"""What a tool has of its result while it still runs, where its author declares that the beginning is final.

Such a tool (``tool.metadata["orla"] = {"final_prefix": True}``) writes pieces of its result as it gets them: texts,
by ``get_stream_writer()`` (LangGraph's stream mode ``custom``) or ``runtime.emit_output_delta()`` (``tools``).
Joined, they are what its result begins with. They pass as ever, and are noted beside that for the next prompt. The
functions that the tool calls are found in the context it runs in, which LangChain makes for it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from langchain_core.runnables.config import var_child_runnable_config
from langchain_core.tools import BaseTool
from langgraph.prebuilt import ToolRuntime

from orla_lg.graph.context import Core
from orla_lg.graph.running_node import current
from orla_lg.graph.tools.metadata import FINAL_PREFIX

_RUNTIME = "__pregel_runtime"
"""Where LangGraph keeps what ``get_stream_writer`` looks up."""

Writer = Callable[[Any], None]


def is_final(tool: BaseTool) -> bool:
    """Whether a tool declares that what it writes first stays."""
    own = (tool.metadata or {}).get("orla")
    return isinstance(own, Mapping) and own.get(FINAL_PREFIX) is True


def heard(manager: Any, arguments: dict[str, Any]) -> dict[str, Any]:
    """Note from now on what the tool writes that begins in this context; returns the arguments for its function.

    Args:
        manager: LangChain's, of the tool's run.
        arguments: What it is called with, a ``ToolRuntime`` perhaps among them.
    """
    run = getattr(manager, "run_id", None)
    core = None if run is None else _core_of(run)
    if core is None:
        return arguments

    def noting(write: Writer | None) -> Writer:
        def noted(piece: Any) -> None:
            if write is not None:
                write(piece)
            if isinstance(piece, str):
                core.next_prompts.tool_wrote(core.serving, run, piece)

        return noted

    _note_deltas(noting)
    config = var_child_runnable_config.get() or {}
    configurable = config.get("configurable") or {}
    if (runtime := configurable.get(_RUNTIME)) is not None:
        runtime = runtime.override(stream_writer=noting(runtime.stream_writer))
        var_child_runnable_config.set({**config, "configurable": {**configurable, _RUNTIME: runtime}})
    return {
        name: replace(value, stream_writer=noting(value.stream_writer)) if isinstance(value, ToolRuntime) else value
        for name, value in arguments.items()
    }


def _note_deltas(noting: Callable[[Writer | None], Writer]) -> None:
    """Note what ``emit_output_delta`` passes on, also where nothing streams it."""
    try:
        from langgraph.pregel._tools import _tool_call_writer
    except ImportError:  # it is LangGraph's own, and newer than what we can do without
        return
    _tool_call_writer.set(noting(_tool_call_writer.get()))


def _core_of(run: Any) -> Core | None:
    """Return the core that awaits a prompt with the result of a tool's *run*; ``None``: none does."""
    node = current()
    for each in () if node is None else node.outward():
        if each.handler is not None:
            core: Core = each.handler.orla_binding.core
            if core.next_prompts.awaits(run):
                return core
    return None
