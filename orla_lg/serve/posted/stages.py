"""Posted stages and variants, as mappers beside the configuration's own.

A call is asked about in this order: its variant; its graph's own mapping; then, together as the shared mapping, what
the file says of its stage by name, the outside service if one is set, the posted stage, and what the file says of any
stage (``"*"``). A file that names a mapper of its own instead of a table decides first; what it declines comes here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from orla_lg.core.boundary.stage_rules import StageRules
from orla_lg.core.call import Assignment, Call
from orla_lg.core.identity import ANY_STAGE
from orla_lg.core.mapping import BY_NAME, Consultation, Mapper, Planned, at_each_call, foretold, named_in_code
from orla_lg.core.placement.view import BackendView
from orla_lg.core.steps import Steps
from orla_lg.errors import MappingError, shown
from orla_lg.mappers.table import Entry
from orla_lg.serve.posted.book import Posted, PostedItems
from orla_lg.serve.posted.items import PostedKind, PostedMapping, PostedStage

DEFAULT_STAGE = "default"
"""What the calls of the gateway that name no stage are posted to."""

MAPPER = f"posted {BY_NAME}"


class StageBook:
    """The posted stages, found as a mapping's table finds them: by a stage's name, or that of a node around it."""

    def __init__(self, items: PostedItems) -> None:
        self._rules = StageRules[PostedStage | str](
            {
                **{name: each.item for name, each in items.of(PostedStage).items()},
                **{name: name for name in items.broken(PostedKind.STAGE)},
            }
        )
        self.is_empty = not self._rules
        """Looked at by each call."""
        self.labelled = {each.item.id: each.item.data_labels for each in items.of(PostedStage).values()}

    def __bool__(self) -> bool:
        return not self.is_empty

    def find(self, stage: str, *, is_gateways: bool = True) -> PostedStage | None:
        """Return what is posted for a stage.

        Args:
            stage: Its name; empty: none.
            is_gateways: Whether a call without a stage is one of ``DEFAULT_STAGE``.

        Raises:
            MappingError: It cannot be read, so that what it restricts is not known.
        """
        named = stage or (DEFAULT_STAGE if is_gateways else "")
        if not named or (found := self._rules.find(named)) is None:
            return None
        if isinstance(found.entry, str):
            raise MappingError(
                f"what is posted for stage {shown(found.entry)} cannot be read; PUT it again, or DELETE it"
            )
        return found.entry


class PostedMapper:
    """The shared mapping where something is posted.

    Args:
        file: What the configuration file says; ``None``: nothing.
        table: The same as its table; ``None`` where it is a mapper of the file's own.
        stages: The posted stages.
        outside: A service that is asked; ``None``: none.
    """

    def __init__(
        self, file: Mapper | None, table: Mapping[str, Entry] | None, stages: StageBook, outside: Mapper | None
    ) -> None:
        self._file, self._stages, self._outside = file, stages, outside
        self._rules = None if table is None else StageRules(dict.fromkeys(table, True))
        self.mappers = tuple(each for each in (file, outside) if each is not None)

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        stage = call.identity.stage
        posted = self._stages.find(stage, is_gateways=not call.may_pass)
        chosen: Assignment | None = None
        is_files = self._is_files(stage)
        if is_files and self._file is not None:
            chosen = yield from ask.mapper(self._file, call, backends)
        if chosen is None and self._outside is not None and not call.ask.embeds:
            chosen = yield from ask.mapper(self._outside, call, backends)
        if chosen is None and posted is not None and posted.backend:
            chosen = Assignment(posted.backend, None, MAPPER, f"posted stage {posted.id!r}")
        if chosen is None and not is_files and self._file is not None:
            chosen = yield from ask.mapper(self._file, call, backends)
        return given(chosen, posted, call, backends)

    def _is_files(self, stage: str) -> bool:
        """Whether what the file says goes before what is posted."""
        if self._rules is None:
            return True
        found = self._rules.find(stage) if stage else None
        return found is not None and not found.name.startswith(ANY_STAGE)

    def foretell(self, stage: str) -> Planned | None:
        """Return what will be said of a stage, as far as that shows without a call."""
        said = None if self._file is None else foretold(self._file, stage)
        if self._is_files(stage) and said is not None:
            return said
        if self._outside is not None:
            return at_each_call(self._outside, stage)
        posted = self._stages.find(stage, is_gateways=False)
        if posted is not None and posted.backend:
            return Planned(stage, (posted.backend,), f"posted stage {posted.id!r}")
        return said


class PostedVariant:
    """A variant of the mapping: its overrides, or those of the file under its name.

    Args:
        inner: Says where a call goes.
        stages: What is posted for its stage holds here too.
    """

    def __init__(self, inner: Mapper, stages: StageBook) -> None:
        self.inner, self._stages = inner, stages

    def consult(self, call: Call, backends: Sequence[BackendView], ask: Consultation) -> Steps:  # noqa: D102
        posted = self._stages.find(call.identity.stage, is_gateways=not call.may_pass)
        chosen: Assignment | None = yield from ask.mapper(self.inner, call, backends)
        return None if chosen is None else given(chosen, posted, call, backends)

    def foretell(self, stage: str) -> Planned | None:
        """Return what it will say of a stage."""
        return foretold(self.inner, stage)


class Overrides:
    """The table of a posted variant; a call without a stage is one of ``DEFAULT_STAGE``.

    Args:
        name: Of the variant.
        overrides: By stage.
    """

    def __init__(self, name: str, overrides: Mapping[str, str]) -> None:
        self._name, self._rules = name, StageRules(overrides)

    def map(self, call: Call, backends: Sequence[BackendView]) -> Assignment | None:  # noqa: D102
        stage = call.identity.stage or ("" if call.may_pass else DEFAULT_STAGE)
        if not stage or (found := self._rules.find(stage)) is None:
            return None
        return Assignment(found.entry, None, MAPPER, f"posted mapping {self._name!r}: {found.name!r}")

    def foretell(self, stage: str) -> Planned | None:
        """Return what it will say of a stage."""
        found = self._rules.find(stage)
        return None if found is None else Planned(stage, (found.entry,), f"posted mapping {self._name!r}")


def variants_of(items: PostedItems, file: Mapping[str, Mapper], stages: StageBook) -> dict[str, Mapper]:
    """Return the variants of the file and those that are posted; the file's win."""
    posted: Mapping[str, Posted[PostedMapping]] = items.of(PostedMapping)
    made: dict[str, Mapper] = {name: Overrides(name, each.item.overrides) for name, each in posted.items()}
    made.update(file)
    if not stages:
        return made
    return {name: PostedVariant(each, stages) for name, each in made.items()}


def given(
    chosen: Assignment | None, posted: PostedStage | None, call: Call, backends: Sequence[BackendView]
) -> Assignment | None:
    """Return an assignment with the parameters of a posted stage; what names no backend goes by the model's name."""
    if posted is None or not posted.reasoning_effort or call.ask.embeds:
        return chosen
    if chosen is None and (chosen := named_in_code(call.ask.model, backends)) is None:
        return None
    parameters: dict[str, Any] = {**chosen.parameters, "reasoning_effort": posted.reasoning_effort}
    return replace(chosen, parameters=parameters)
