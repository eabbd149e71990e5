"""SGLang: a radix cache with sessions."""

from orla_lg_sglang.adapter import SGLangAdapter

__all__ = ["SGLangAdapter"]
