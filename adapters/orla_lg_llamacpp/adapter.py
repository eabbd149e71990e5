"""llama.cpp's server: KV cache lives in numbered slots, so a workflow's cache is a slot it sits in."""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import httpx

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import MAX_SLOTS, Backend, Capability, Directions, Effect, Probe, Support, whole
from orla_lg.core.engine.capabilities import Copied, EngineStats, Scope, WholeCache, WorkflowCache
from orla_lg.errors import BackendUnavailable, EngineRefused
from orla_lg.openai_api.adapter import PLAIN_CAPABILITIES, PLAIN_WIRES, OpenAIAdapter, advised
from orla_lg.openai_api.metrics import sample
from orla_lg.wires import chat, reading

SLOT_TIMEOUT_S = 30.0
"""A slot's order waits for the batch that the engine works on."""

COPIED_WORDS = 32
"""Of six digits each, which is some 130 tokens: templates add fewer than half as many."""

_SLOT_ACTIONS = (Capability.FLUSH_WORKFLOW, Capability.FLUSH_ALL, Capability.SAVE_RESTORE)
_ADVICE: Mapping[Capability, str] = {
    **dict.fromkeys(
        _SLOT_ACTIONS, "`--slot-save-path DIR/` would let a workflow's cache be erased, saved and restored"
    ),
    Capability.STATS: "`--slots` would let its load be seen",
}
_HALF_SPOKEN = frozenset({"responses"})
"""Events of its streams have no ``output_index``, which OpenAI's SDK needs, and cut answers are completed."""
_NAME = re.compile(r"[^A-Za-z0-9_.-]")
_DRAWN = re.compile(r"<__media_\w{16,}__>")
STARTED, SAVED_IN = "orla_lg_started", "orla_lg_saved_in"
"""What an embedded engine says in its ``ui_settings``, where nobody else heeds it: what it drew, and its folder.
Where the folder differs (one made for an engine goes with it), the files are not those that were saved."""


class LlamaCppAdapter(OpenAIAdapter):
    """Gives every request the slot its workflow sits in (``id_slot`` reserves nothing by itself)."""

    keep_alive = False  # a third of the requests that reused a connection after a stream failed
    prefill_only: ClassVar[Mapping[str, Any]] = {"n_predict": 0, "max_tokens": 0}

    def __init__(self, backend: Backend) -> None:
        super().__init__(backend)
        self._slots: int | None = None
        """How many slots there are, as of the last probe."""
        self._copies: tuple[str, bool | None] | None = None
        """For the incarnation that was tried: whether it keeps prompts in memory that left their slots."""

    async def probe(self) -> Probe:
        """Ask for models, slots and context, and whether slots can be erased."""
        plain = await super().probe()
        props = await self.get(self.root + "props")
        erasable = await self._can_erase()
        slots, context = (
            whole(props.get("total_slots")),
            whole(_part(props, "default_generation_settings").get("n_ctx")),
        )
        self._slots = slots if slots is not None and slots <= MAX_SLOTS else None
        incarnation = _drawn_at_start(props)
        if self.backend.isolate_tenants:
            await self._try_copies(incarnation)
        return advised(
            plain,
            capabilities={
                **PLAIN_CAPABILITIES,
                **dict.fromkeys(_SLOT_ACTIONS, Support.NATIVE if erasable else Support.FLAG),
                Capability.PIN: Support.EMULATED,
                Capability.RELEASE: Support.EMULATED,
                Capability.ISOLATE: Support.EMULATED,
                Capability.WARM: Support.NATIVE,
                Capability.TOKENIZE: Support.NATIVE,
                Capability.STATS: Support.NATIVE if await self.seen(self.root + "slots") else Support.FLAG,
            },
            context_tokens=context,
            slots=self._slots,
            kv_tokens=context * self._slots if self._slots and context else None,
            vision=_vision(props),
            version=str(props.get("build_info") or ""),
            incarnation=incarnation,
            wires=(PLAIN_WIRES | await self.wires.spoken(incarnation)) - _HALF_SPOKEN,
            weights=f"{props.get('model_path')} {props.get('model_ftype')} {_own(props).get(SAVED_IN, '')}".rstrip(),
            advice=_ADVICE,
        )

    async def _can_erase(self) -> bool:
        # An unknown action is refused as invalid where slot actions are on, as unsupported where they are off.
        try:
            await self.ask("POST", self.root + "slots/0?action=orla-probe")
        except EngineRefused as error:
            return error.status == 400
        except BackendUnavailable:
            pass
        return False

    async def _try_copies(self, incarnation: str) -> None:
        """Find out, once for each start, whether the engine fills slots with what others held (``--cache-ram``).

        The same prompt is asked again in a slot that held another one meanwhile.
        """
        known = self._copies
        if self._slots is None or (known is not None and known[0] == incarnation and known[1] is not None):
            return
        first, between = (" ".join(secrets.token_hex(3) for _ in range(COPIED_WORDS)) for _ in range(2))
        found, prompt = 0, 0
        try:
            for text in (first, between, first):
                body = {
                    "messages": [{"role": "user", "content": text}], "model": self.backend.model or "",
                    "id_slot": self._slots - 1, "cache_prompt": True, **self.prefill_only,
                }  # fmt: skip
                usage = chat.usage_of((await self.post("chat/completions", body)).get("usage") or {})
                found, prompt = usage.cached_tokens or 0, usage.prompt_tokens
        except (EngineRefused, BackendUnavailable):
            self._copies = incarnation, None  # not known; the next probe asks again
        else:
            self._copies = incarnation, found > prompt / 2

    def request_fields(self, ask: Ask, told: Directions) -> dict[str, Any]:
        """Name the slot, and whether its old tokens may be reused.

        Where tenants are isolated nothing is reused by an engine that may fill a slot with anybody's prompt: without
        a slot it takes the one with the most similar prompt, and its own copies are found from every slot.
        """
        anybodys = self.backend.isolate_tenants and (
            told.slot is None or self._copies is None or self._copies[1] is not False
        )
        fields: dict[str, Any] = {"cache_prompt": not (told.fresh or anybodys)}
        if told.slot is not None:
            fields["id_slot"] = told.slot
        return fields

    # KVControl: a workflow's cache is its slot, and nobody is sent to a slot but by us

    async def pin(self, scope: Scope, *, ttl_s: float | None = None) -> Effect:
        """Say that a slot stays: the engine need not be told, for only we give slots away."""
        return Effect.PINNED if _slot_of(scope) is not None else Effect.UNSUPPORTED

    async def release(self, scope: Scope) -> Effect:
        """Say that a slot may be given away; its cache stays until somebody else sits down."""
        return Effect.DEMOTED if _slot_of(scope) is not None else Effect.UNSUPPORTED

    async def flush(self, scope: Scope) -> Effect:
        """Erase a workflow's slot, or all of them."""
        if isinstance(scope, WholeCache):
            effects = [await self.erase(slot) for slot in range((await self.probe()).slots or 0)]
            return Effect.FREED if effects and set(effects) == {Effect.FREED} else Effect.FAILED
        slot = _slot_of(scope)
        return Effect.UNSUPPORTED if slot is None else await self.erase(slot)

    # SlotStore

    async def erase(self, slot: int) -> Effect:
        """Empty a slot."""
        return (await self._slot_order(slot, "erase", Effect.FREED))[0]

    async def save(self, slot: int, name: str) -> Copied:
        """Write a slot's cache to a file in the engine's ``--slot-save-path``."""
        effect, answer = await self._slot_order(slot, "save", Effect.SAVED, name)
        return Copied(effect, _count(answer, "n_saved"))

    async def restore(self, slot: int, name: str) -> Effect:
        """Read a slot's cache from a file."""
        return (await self._slot_order(slot, "restore", Effect.RESTORED, name))[0]

    async def _slot_order(
        self, slot: int, action: str, effect: Effect, name: str = ""
    ) -> tuple[Effect, httpx.Response | None]:
        if self._slots is not None and slot >= self._slots:
            return Effect.FAILED, None  # the engine would not refuse, but take another slot instead
        url = f"{self.root}slots/{slot}?action={action}"
        body = {"filename": _NAME.sub("_", name)} if name else None
        return await self.order(effect, url, body, timeout_s=SLOT_TIMEOUT_S)

    # Observable, Tokenizing

    async def stats(self) -> EngineStats:
        """Count busy slots; the rest comes from ``--metrics``, if it has them."""
        try:
            told = (await self.ask("GET", self.root + "slots")).json()
        except (EngineRefused, ValueError) as error:
            raise BackendUnavailable(str(error)) from error
        slots = [slot for slot in told if isinstance(slot, Mapping)] if isinstance(told, list) else []
        metrics = await self.seen(self.root + "metrics")
        text = "" if metrics is None else metrics.text
        waiting = sample(text, "llamacpp:requests_deferred")
        computed, hits = sample(text, "llamacpp:prompt_tokens"), sample(text, "llamacpp:prompt_tokens_cached")
        return EngineStats(
            running=sum(bool(slot.get("is_processing")) for slot in slots),
            waiting=None if waiting is None else int(waiting),
            kv_tokens=sum(whole(slot.get("n_ctx")) or 0 for slot in slots) or None,
            prefix_queries=None if computed is None or hits is None else int(computed + hits),
            prefix_hits=None if hits is None else int(hits),
        )

    async def tokenize(self, body: Mapping[str, Any]) -> Sequence[int]:
        """Apply the chat template, then tokenize what comes out."""
        shaped = {key: body[key] for key in ("messages", "tools") if key in body}
        prompt = (await self.post(self.root + "apply-template", shaped)).get("prompt")
        asked = {"content": prompt, "add_special": True, "parse_special": True}
        return self.tokens_in(await self.post(self.root + "tokenize", asked))


def _count(answer: httpx.Response | None, name: str) -> int | None:
    """Return a number of an answer; ``None`` if it has none of that name."""
    try:
        said = None if answer is None else reading.parse(answer.content)
    except reading.Garbage:
        return None
    return reading.count(said.get(name)) if isinstance(said, Mapping) else None


def _slot_of(scope: Scope) -> int | None:
    return scope.slot if isinstance(scope, WorkflowCache) else None


def _drawn_at_start(props: Mapping[str, Any]) -> str:
    """Return what the server's process drew at random, and what the embedded engine did, which may share a process.

    The first marks where images go in prompts. Older servers draw nothing.
    """
    marker = str(props.get("media_marker") or "")
    return (marker if _DRAWN.fullmatch(marker) else "") + str(_own(props).get(STARTED, ""))


def _own(props: Mapping[str, Any]) -> Mapping[str, Any]:
    return _part(props, "ui_settings")


def _part(props: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    part = props.get(name)
    return part if isinstance(part, Mapping) else {}


def _vision(props: Mapping[str, Any]) -> bool | None:
    told = _part(props, "modalities").get("vision")
    return told if isinstance(told, bool) else None
