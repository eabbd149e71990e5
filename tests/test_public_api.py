from __future__ import annotations

import ast
import inspect
import re
from importlib import import_module
from pathlib import Path

import orla_lg

ROOT = Path(__file__).parents[1]

DOCUMENTED = {
    "orla_lg.core.backend": (
        "Backend BackendAdapter Capability Cost Directions Effect MOST_CALLS MOST_SAVED OWN_HEADERS Probe Support "
        "model_asked whole with_fields"
    ),
    "orla_lg.core.control": (
        "Abortable BlocksCleared BlocksRemoved BlocksStored Copied EngineStats KVControl KVEvent KVEventSource "
        "Lingering Observable PrefixCache Scope Sleepable SlotStore Tokenizing Warmable Warmed WholeCache "
        "WorkflowCache"
    ),
    "orla_lg.core.call": (
        "ANSWER_TOKENS Ask Assignment CHARS_PER_TOKEN CacheHint Call CallerTimeout Chunk Considered Hints NO_HINTS "
        "Usage"
    ),
    "orla_lg.core.policies": (
        "ANY_BACKEND ANY_STAGE EarliestDeadline Fair Fcfs LeastAttained NAMES Policies Priority "
        "RequestChoice RequestPolicy ShortestJob ShortestRemaining Sortable StageChoice StagePolicy WorkflowFcfs "
        "changed name_of policies policy"
    ),
    "orla_lg.openai_api.adapter": "Answer MAX_BYTES OpenAIAdapter PLAIN_CAPABILITIES TIMEOUT_S advised chunk_of",
    "orla_lg.testing.conformance": "CHECKS Check Report Subject conform",
    "orla_lg.testing.faults": "Fault FaultEngine MODEL Reply",
    "orla_lg.testing.virtual": "StillAdapter VirtualServing",
}
"""Import paths beside ``orla_lg`` that adapters, policies and their tests elsewhere rely on."""

INNER = ("orla_lg.core", "orla_lg.openai_api", "orla_lg.testing")

SHOWN = {"orla_lg.core.identity": "Identity", "orla_lg.core.workflow": "Outcome"}
"""What pages show beside these, of the core as it is now."""


def test_names_are_sorted_distinct_and_there() -> None:
    assert orla_lg.__all__ == sorted(set(orla_lg.__all__))
    assert all(hasattr(orla_lg, name) for name in orla_lg.__all__)


def test_every_public_name_and_method_is_described() -> None:
    for name in orla_lg.__all__:
        thing = getattr(orla_lg, name)
        assert inspect.getdoc(thing), name
        own = [m for key, m in vars(thing).items() if not key.startswith("_") and inspect.isfunction(m)]
        for method in own:  # a Protocol's method is described there
            described = inspect.getdoc(method) or method.__name__ in ("map", "key", "decide")
            assert described or "orla_lg" not in method.__module__, (name, method)


def test_documented_paths_offer_their_names() -> None:
    for path, names in DOCUMENTED.items():
        missing = [name for name in names.split() if not hasattr(import_module(path), name)]
        assert not missing, f"{path} has no {missing}"


def test_pages_and_examples_show_documented_paths() -> None:
    pages = [page.read_text() for page in (*(ROOT / "docs").rglob("*.md"), ROOT / "README.md")]
    blocks = [block for page in pages for block in re.findall(r"^```python\n(.*?)^```", page, re.S | re.M)]
    blocks += [file.read_text() for file in (ROOT / "examples").rglob("*.py")]
    shown = [
        (node.module, alias.name)
        for block in blocks
        for node in ast.walk(ast.parse(block))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(INNER)
        for alias in node.names
    ]
    known = {(path, name) for path, names in {**DOCUMENTED, **SHOWN}.items() for name in names.split()}
    assert ("orla_lg.core.backend", "Probe") in shown
    assert not set(shown) - known
