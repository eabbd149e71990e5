"""Whether an engine can do what a call asks, as far as it said what it can."""

from __future__ import annotations

from orla_lg.core.call import Ask
from orla_lg.core.engine.backend import Capability, Probe, model_asked
from orla_lg.core.placement.view import BackendView
from orla_lg.errors import did_you_mean

CHARS_PER_TOKEN_AT_MOST = 12
"""No tokenizer in use packs natural text or code more densely; a prompt refused by it is surely too long."""

SHOWN_MODELS = 20
"""Of those that a backend serves, in a message."""


def unfit(ask: Ask, backend: BackendView, model: str | None) -> list[str]:
    """Return why *backend* cannot do what is asked; empty where it can, or has not said what it can."""
    probe = backend.probe
    if probe is None:
        return []
    if model is not None:
        return unserved(model, probe) + lacks(ask, probe)
    if not backend.model and model_asked(None, probe, ask.model) is None:
        return [several(probe, ask.model), *lacks(ask, probe)]
    return lacks(ask, probe)


def unserved(model: str, probe: Probe | None) -> list[str]:
    """Return a fault if an engine lists models and *model* is none of them."""
    if probe is None or not probe.models or model in probe.models:
        return []
    return [f"model {model!r} is not served there{did_you_mean(model, probe.models)}"]


def several(probe: Probe, in_code: str) -> str:
    """Return what is wrong where neither the backend nor the code names one of several models."""
    listed = ", ".join(probe.distinct[:SHOWN_MODELS]) + (", …" if len(probe.distinct) > SHOWN_MODELS else "")
    return (
        f"it serves several models ({listed}) and not {in_code!r}, which the code names; name one of them there, "
        "or as the backend's model"
    )


def lacks(ask: Ask, probe: Probe | None) -> list[str]:
    """Return what is asked and an engine cannot do, whatever its model; empty where it has not said what it can."""
    if probe is None:
        return []
    faults = []
    if ask.json_schema and not probe.can(Capability.JSON_SCHEMA):
        faults.append("the engine cannot follow a JSON schema")
    if ask.tools and not probe.can(Capability.TOOLS):
        faults.append("the engine cannot call tools")
    if probe.vision is False and ask.images:
        faults.append("the model cannot see images")
    if probe.context_tokens is not None:
        at_least = ask.prompt_chars // CHARS_PER_TOKEN_AT_MOST
        prompt = f"the prompt has at least {at_least} tokens ({ask.prompt_chars} characters)"
        if at_least > probe.context_tokens:
            faults.append(f"{prompt}, its context holds {probe.context_tokens}")
        elif probe.request_tokens is not None and at_least + (ask.max_tokens or 0) > probe.request_tokens:
            bound = f"max_tokens is {ask.max_tokens}, its context holds {probe.request_tokens} for both"
            faults.append(f"{prompt} and {bound}")
    return faults
