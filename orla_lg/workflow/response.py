"""A structured answer: what is asked of the engine, and how what came is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from langchain_core.utils.function_calling import convert_to_json_schema
from pydantic import BaseModel, ValidationError

from orla_lg.errors import StageError

SHOWN_CHARS = 200
"""How much of an answer that cannot be read is shown."""


@dataclass(frozen=True, slots=True)
class ResponseFormat:
    """What a stage's answer must follow."""

    stage: str
    schema: type[BaseModel] | Mapping[str, Any]

    def fault(self) -> str | None:
        """Return what is wrong with the schema, as far as that shows before it is used."""
        if isinstance(self.schema, type) and issubclass(self.schema, BaseModel):
            return None
        if isinstance(self.schema, Mapping) and "type" in self.schema and self.schema["type"] != "json_schema":
            return None
        return f"response_format must be a pydantic model or a JSON schema with a 'type', got {self.schema!r}"

    def field(self) -> dict[str, Any]:
        """Return the request's ``response_format``."""
        if isinstance(self.schema, Mapping):
            named: dict[str, Any] = {"name": self.stage, "schema": dict(self.schema)}
        else:
            schema = convert_to_json_schema(self.schema, strict=True)
            named = {"name": self.schema.__name__, "schema": schema, "strict": True}
        return {"type": "json_schema", "json_schema": named}

    def read(self, text: str) -> Any:
        """Return the answer as an object of the pydantic model, or as JSON.

        Raises:
            StageError: It is neither.
        """
        try:
            return json.loads(text) if isinstance(self.schema, Mapping) else self.schema.model_validate_json(text)
        except (ValidationError, ValueError) as error:
            wanted = "JSON" if isinstance(self.schema, Mapping) else self.schema.__name__
            shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"
            raise StageError(f"stage {self.stage!r}: its answer is no {wanted}: {shown!r}") from error
