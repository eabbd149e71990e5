"""Embeddings: a stage beside its node's, placed by the tables that name it, and alone in every cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from orla_lg.core.boundary.stage_keys import EMBEDDINGS, with_part
from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.call import Call
from orla_lg.core.identity import Identity
from orla_lg.core.mapping import Mapper, parts_of


def beside(identity: Identity) -> Identity:
    """Return the identity of an embedding that a node asks for; outside any graph it is in no stage."""
    return replace(identity, stage=with_part(identity.stage, EMBEDDINGS)) if identity.stage else identity


def naming(mappers: Iterable[Mapper], stage: str) -> tuple[Mapper, ...]:
    """Return the tables in *mappers* that name what decides a stage; other mappers know chat models only."""
    tables = ((part, getattr(part, "rules", None)) for mapper in mappers for part in parts_of(mapper))
    return tuple(part for part, rules in tables if isinstance(rules, StageRules) and rules.find(stage) is not None)


def alone(call: Call) -> Call:
    """Return the call as a queue sees it: of a workflow of its own, which leaves nothing in a cache."""
    return replace(call, identity=replace(call.identity, workflow=f"call-{call.id}"))
