"""vLLM: a block pool with prefix caching.

What lies in this package beside the adapter runs inside vLLM's own environment, so importing the package
pulls nothing in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orla_lg_vllm.adapter import VLLMAdapter

__all__ = ["VLLMAdapter"]


def __getattr__(name: str) -> Any:
    if name == "VLLMAdapter":
        from orla_lg_vllm.adapter import VLLMAdapter

        return VLLMAdapter
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
