"""llama.cpp: the adapter for its server, and the same server embedded in Python (``embedded``, ``model``)."""

from orla_lg_llamacpp.adapter import LlamaCppAdapter

__all__ = ["LlamaCppAdapter"]
