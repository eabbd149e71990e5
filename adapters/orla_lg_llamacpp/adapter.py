"""llama.cpp's server: KV cache lives in numbered slots, so a workflow's cache is a slot it sits in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx

from orla_lg.core.backend import Capability, Effect, Probe, Support
from orla_lg.core.call import Ask
from orla_lg.openai_api.client import PLAIN_CAPABILITIES, OpenAIAdapter, get_json

ERASE_TIMEOUT_S = 30.0
ADVICE_SAVE = "`--slot-save-path DIR/` would let a workflow's cache be erased, saved and restored"


class LlamaCppAdapter(OpenAIAdapter):
    """Gives every request the slot its workflow sits in (``id_slot`` reserves nothing by itself)."""

    keep_alive = False  # a third of the requests that reused a connection after a stream failed

    @property
    def root(self) -> str:
        """The server's own API lies beside ``/v1``."""
        parts = urlsplit(self.backend.url)
        return urlunsplit((parts.scheme, parts.netloc, parts.path.rstrip("/").removesuffix("/v1") + "/", "", ""))

    async def probe(self) -> Probe:
        """Ask for models, slots and context, and whether slots can be erased."""
        plain = await super().probe()
        async with self.http() as http:
            props = await get_json(http, self.backend, self.root + "props")
            erasable = await self._can_erase(http)
        settings = props.get("default_generation_settings") or {}
        slots = props.get("total_slots")
        return Probe(
            models=plain.models,
            capabilities=_capabilities(erasable=erasable),
            context_tokens=settings.get("n_ctx"),
            slots=slots if isinstance(slots, int) and slots > 0 else None,
            version=str(props.get("build_info") or ""),
            advice=() if erasable else (ADVICE_SAVE,),
        )

    async def _can_erase(self, http: httpx.AsyncClient) -> bool:
        # An unknown action is refused as invalid where slot actions are on, as unsupported where they are off.
        try:
            answer = await http.post(self.root + "slots/0?action=orla-probe")
        except httpx.HTTPError:
            return False
        return answer.status_code == 400

    def request_fields(self, ask: Ask, *, priority: float, slot: int | None, fresh: bool) -> dict[str, Any]:
        """Name the slot, and whether its old tokens may be reused."""
        fields: dict[str, Any] = {"cache_prompt": not fresh}
        if slot is not None:
            fields["id_slot"] = slot
        return fields

    async def erase(self, slot: int) -> Effect:
        """Empty a slot."""
        async with self.http() as http:
            try:
                answer = await http.post(f"{self.root}slots/{slot}?action=erase", timeout=ERASE_TIMEOUT_S)
            except httpx.HTTPError:
                return Effect.FAILED
        if answer.status_code in (404, 501):
            return Effect.UNSUPPORTED
        return Effect.FREED if answer.is_success else Effect.FAILED


def _capabilities(*, erasable: bool) -> Mapping[Capability, Support]:
    slot_actions = Support.NATIVE if erasable else Support.FLAG
    return {
        **PLAIN_CAPABILITIES,
        Capability.CACHED_TOKENS: Support.NATIVE,
        Capability.FLUSH_WORKFLOW: slot_actions,
        Capability.FLUSH_ALL: slot_actions,
        Capability.PIN: Support.EMULATED,
        Capability.WARM: Support.NATIVE,
        Capability.SAVE_RESTORE: slot_actions,
        Capability.TOKENIZE: Support.NATIVE,
    }
