"""Ollama: models that load and unload; no control of the KV cache."""

from orla_lg_ollama.adapter import OllamaAdapter

__all__ = ["OllamaAdapter"]
