"""Asks an engine the same twice, in one piece and as a stream, and keeps whether that is equal (``agreement``).

The pair is asked for by itself, behind the call that would have been streamed: that call is not. Both requests wait
for their turn as any call does, and have records of their own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
from collections.abc import Hashable, Mapping
from dataclasses import replace
from typing import Any, NoReturn

import openai
from openai._models import FinalRequestOptions

from orla_lg.core.engine.backend import Probe
from orla_lg.core.identity import standalone
from orla_lg.core.inflight import InFlightCall
from orla_lg.core.placement.internal_call import InternalMapping
from orla_lg.core.serving import Serving
from orla_lg.core.steps import adrive
from orla_lg.errors import OrlaClosed, OrlaError
from orla_lg.openai_api.agreement import differences, engine_of, has_calls, is_cut
from orla_lg.openai_api.client import EngineClients, SdkSender, timeout_of
from orla_lg.openai_api.dialect import may_refuse
from orla_lg.openai_api.failures import FAILURES
from orla_lg.wires.chat import ask_of

STAGE = "orla_lg-pair-check"
"""The stage of the two calls in records."""
PAIR_S = 300.0
"""So long both may take together, the wait for their turn included."""
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
"""An answer in one piece, and one that was streamed."""
MAX_TOKENS = 64
MORE_TOKENS = 512
"""Where no tool was called in so few: a model may reason first."""
ONE_PARSER = frozenset({"llamacpp"})
"""Engines that find a call that is forced by the same code as one that is not, so that either shows the other."""

QUESTION: Mapping[str, Any] = {
    "messages": [{"role": "user", "content": "Look up the weather in Paris, in Celsius. Use the tool."}],
    "tools": [{
        "type": "function",
        "function": {
            "name": "look_up_weather",
            "description": "Look up the weather in a city.",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string"}, "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                },
                "required": ["city", "unit"],
                "additionalProperties": False,
            },
        },
    }],
    "temperature": 0,
    "max_tokens": MAX_TOKENS,
}  # fmt: skip


class PairChecks:
    """Decides for the calls of one core whether an answer may be streamed from an engine that is asked for it whole.

    Args:
        serving: The core.
    """

    def __init__(self, serving: Serving) -> None:
        self._serving = serving

    def agrees(self, clients: EngineClients, inflight: InFlightCall, body: Mapping[str, Any]) -> bool | None:
        """Whether an engine's answers are equal both ways; ``None`` where that is not known yet.

        Args:
            clients: The engine's.
            inflight: The call that would be streamed.
            body: Its request.
        """
        assert inflight.scheduler is not None and inflight.model is not None
        probe = inflight.scheduler.health.probe
        known = clients.agreement.holds(engine_of(probe))
        if known is None:
            with contextlib.suppress(OrlaClosed):
                begin(self._serving, clients, probe, {"model": inflight.model, **_choice(body)})
        return known


def begin(
    serving: Serving, clients: EngineClients, probe: Probe | None, more: Mapping[str, Any]
) -> concurrent.futures.Future[None] | None:
    """Ask an engine for a pair, if it was not asked before; ``clients.agreement`` then has what came of it.

    Args:
        serving: The core.
        clients: The engine's.
        probe: What it answered to the last one.
        more: What the request has beside ``QUESTION``: the model at least.

    Raises:
        OrlaClosed: The core is closed.
    """
    engine = engine_of(probe)
    if not clients.agreement.begins(engine):
        return None
    return serving.background.submit(_find_out(serving, clients, {**QUESTION, **more}, engine))


def _choice(body: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return how a tool is asked for, as the call does it: engines find calls in other ways where one is forced."""
    return {"tool_choice": "required"} if body.get("tool_choice") not in (None, "auto", "none") else {}


async def _find_out(serving: Serving, clients: EngineClients, asked: Mapping[str, Any], engine: Hashable) -> None:
    """Ask both ways, and keep what came of it; runs on the core's own loop."""
    agreement = clients.agreement
    pair: Pair | None = None
    try:
        async with asyncio.timeout(PAIR_S):
            pair = await _pair(serving, clients, asked)
            if not has_calls(pair[0]) and not any(differences(*pair)):
                again = _once_more(asked, pair[0], clients.backend.engine)
                pair = pair if again is None else await _pair(serving, clients, again)
        agreement.learn(engine, *pair)
    except RecursionError:
        agreement.conclude(engine, ["they are nested too deeply to be compared"])
    except (OrlaError, TimeoutError, *FAILURES) as error:
        if not isinstance(error, openai.APIStatusError) or not may_refuse(
            asked, error.status_code, error.response.text
        ):
            agreement.fails(engine, error)
        elif pair is not None:  # it took the request as it was put first
            agreement.learn(engine, *pair)
        else:
            agreement.conclude(engine, [f"it refuses the request that was to show it ({error.status_code})"])
    except BaseException as error:  # cut off at the end, or a fault of ours
        agreement.fails(engine, error)
        raise


def _once_more(asked: Mapping[str, Any], plain: Mapping[str, Any], engine: str) -> Mapping[str, Any] | None:
    """Return how to ask again where no tool was called; ``None`` where that would show nothing new."""
    more = {**asked, "max_tokens": MORE_TOKENS}
    if engine in ONE_PARSER:
        return {**more, "tool_choice": "required"}
    return more if is_cut(plain) else None


async def _pair(serving: Serving, clients: EngineClients, asked: Mapping[str, Any]) -> Pair:
    plain = await _answer(serving, clients, asked, assemble=False)
    return plain, await _answer(serving, clients, asked, assemble=True)


async def _answer(
    serving: Serving, clients: EngineClients, asked: Mapping[str, Any], *, assemble: bool
) -> Mapping[str, Any]:
    name, call_id, client = clients.backend.name, serving.new_id(), clients.on_loop()
    options = FinalRequestOptions.construct(method="post", url="/chat/completions", json_data=dict(asked))
    identity = replace(standalone(call_id), stage=STAGE)
    inflight = serving.arrive(
        identity, ask_of(asked), call_id=call_id, mappers=(InternalMapping(name, STAGE),),
        timeout=timeout_of(client, options),
    )  # fmt: skip
    form = {"cast_to": object, "stream": False, "stream_cls": None}
    sender = SdkSender({name: clients}, client, _nowhere_else, options, form, assemble=assemble)
    answer = await adrive(serving.serve(inflight, sender))
    return answer if isinstance(answer, Mapping) else {}


def _nowhere_else() -> NoReturn:
    raise AssertionError("a call of its own goes to its backend")
