"""The Orla paper's own way to write a workflow: stages, dependencies, builders (its appendix A and B).

A ``Workflow`` is a way to write a LangGraph graph, not a second executor: ``compile`` returns the graph, wrapped.
Read ``stage`` (what one is), ``node`` (how one runs), ``response`` (what it answers in), ``order`` (what can be
wrong with a whole), ``workflow``.
"""

from orla_lg.workflow.stage import Stage, StageResult, Upstream
from orla_lg.workflow.workflow import Workflow

__all__ = ["Stage", "StageResult", "Upstream", "Workflow"]
