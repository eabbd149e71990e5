"""Ollama: models that load and unload; no control of the KV cache."""
