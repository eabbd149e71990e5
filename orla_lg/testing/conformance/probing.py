"""What an engine says of itself, and whether an adapter passes that on honestly."""

from __future__ import annotations

import asyncio
import socket
import time

from orla_lg.core.engine.backend import Capability, Support
from orla_lg.errors import BackendUnavailable
from orla_lg.testing.conformance.subject import Subject, expect, skip
from orla_lg.testing.conformance.suite import FACES, Check, check

DEAD_LIMIT_S = 10.0


@check(unprobed=True)
async def probe_answers(on: Subject) -> None:
    """The engine answers its probe, which names the model that is asked for."""
    probe = await on.probe()
    expect(not probe.models or on.model_name in probe.models, f"{on.model_name!r} is not among {probe.models}")


@check()
async def probe_tells_the_context(on: Subject) -> None:
    """Context length, slots and KV capacity are positive numbers where the engine tells them."""
    probe = await on.probe()
    for name in ("context_tokens", "slots", "kv_tokens"):
        told = getattr(probe, name)
        expect(told is None or (isinstance(told, int) and told > 0), f"{name} is {told!r}")
    if probe.context_tokens is None:
        skip("the engine does not tell its context length")


@check()
async def capabilities_are_complete(on: Subject) -> None:
    """Every capability has a support, and no other key has one."""
    said = (await on.probe()).capabilities
    expect(set(said) == set(Capability), f"missing {sorted(set(Capability) - set(said))}")
    wrong = {name: support for name, support in said.items() if not isinstance(support, Support)}
    expect(not wrong, f"no Support: {wrong}")


@check()
async def advice_is_given(on: Subject) -> None:
    """What a flag or a plugin would bring comes with advice, and nothing that works or never can does."""
    probe = await on.probe()
    gainable = {name for name, how in probe.capabilities.items() if how in (Support.FLAG, Support.PLUGIN)}
    expect(gainable <= set(probe.advice), f"no advice for {sorted(gainable - set(probe.advice))}")
    expect(set(probe.advice) <= gainable, f"needless advice for {sorted(set(probe.advice) - gainable)}")
    expect(all(text.strip() for text in probe.advice.values()), "advice is empty")


@check()
async def claims_have_methods(on: Subject) -> None:
    """For each usable capability the adapter has the methods."""
    probe = await on.probe()
    bare = [name for name, face in FACES.items() if probe.can(name) and not isinstance(on.adapter, face)]
    expect(not bare, f"usable by the probe, but the adapter has no methods for {', '.join(bare)}")


@check()
async def probe_is_steady(on: Subject) -> None:
    """Two probes of one engine say the same, its incarnation included."""
    first, second = await on.adapter.probe(), await on.adapter.probe()
    expect(first == second, f"first {first}, then {second}")


@check(unprobed=True)
async def dead_port_is_named(on: Subject) -> None:
    """Where nobody listens, probe and generate raise BackendUnavailable, soon, and the message names the place."""
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        port = bound.getsockname()[1]
    adapter = on.another(f"http://127.0.0.1:{port}/v1")
    began = time.perf_counter()
    try:
        async with asyncio.timeout(DEAD_LIMIT_S):
            await adapter.probe()
    except BackendUnavailable as error:
        name = on.backend.name if on.backend is not None else str(port)
        expect(name in str(error) or str(port) in str(error), f"the message names neither backend nor port: {error}")
    except TimeoutError:
        expect(False, f"no answer about a dead port after {time.perf_counter() - began:.0f} s")
    else:
        expect(False, "the probe of a dead port succeeded")
    try:
        async for _ in adapter.generate({"model": "any", "messages": [{"role": "user", "content": "hello"}]}):
            expect(False, "a stream came from a dead port")
    except BackendUnavailable:
        pass
    else:
        expect(False, "a stream from a dead port ended well")
    finally:
        await adapter.aclose()


CHECKS: tuple[Check, ...] = (
    probe_answers,
    probe_tells_the_context,
    capabilities_are_complete,
    advice_is_given,
    claims_have_methods,
    probe_is_steady,
    dead_port_is_named,
)
