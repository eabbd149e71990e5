"""Stage mappers, ready to use and to put together; docs/mapping.md shows each of them.

``ExplicitMapper`` and ``StageTable`` are what a dict given to ``Orla`` becomes. Any object with ``map(call,
backends)`` is a mapper too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orla_lg.mappers.cost_quality import CostQualityMapper
    from orla_lg.mappers.http import HttpMapper
    from orla_lg.mappers.learned import EmbeddingMapper, LearnedMapper
    from orla_lg.mappers.load import LoadAware
    from orla_lg.mappers.need import NeedMapper
    from orla_lg.mappers.one_bit import OneBitStageMapper
    from orla_lg.mappers.table import ExplicitMapper, First, StageTable

__all__ = [
    "CostQualityMapper",
    "EmbeddingMapper",
    "ExplicitMapper",
    "First",
    "HttpMapper",
    "LearnedMapper",
    "LoadAware",
    "NeedMapper",
    "OneBitStageMapper",
    "StageTable",
]

_HOMES = {
    "cost_quality": "CostQualityMapper",
    "http": "HttpMapper",
    "learned": "EmbeddingMapper LearnedMapper",
    "load": "LoadAware",
    "need": "NeedMapper",
    "one_bit": "OneBitStageMapper",
    "table": "ExplicitMapper First StageTable",
}
"""Where they are made, by module."""

if not TYPE_CHECKING:
    from orla_lg.importing import lazily

    __getattr__, __dir__ = lazily(__name__, __all__, _HOMES)
