"""What each control request does to a core, for every way that requests come: the socket, and a server's routes."""

from __future__ import annotations

from orla_lg.control import protocol
from orla_lg.control.protocol import ControlReply, Request
from orla_lg.control.state import state
from orla_lg.core.operation.steering import KEEP
from orla_lg.core.serving import Serving
from orla_lg.core.steps import adrive
from orla_lg.errors import ConfigError


async def carry_out(serving: Serving, request: Request) -> ControlReply:
    """Do what a request asks for, and return the answer; a drain takes its time.

    Raises:
        OrlaError: It cannot be done, and nothing was changed.
    """
    steering = serving.steering
    match request:
        case protocol.Pause(backend=backend):
            steering.pause(backend)
        case protocol.Resume(backend=backend):
            steering.resume(backend)
        case protocol.Drain(backend=backend, timeout_s=timeout_s):
            return ControlReply(ok=True, drained=await adrive(steering.drain(backend, timeout_s)))
        case protocol.Policy():
            steering.set_policy(request.stage_policy, request.request_policy, request.backend)
        case protocol.SetLimit(backend=backend):
            given = request.model_fields_set
            bound = request.max_concurrency if "max_concurrency" in given else KEEP
            steering.set_limit(backend, bound, request.capacity if "capacity" in given else KEEP)
        case protocol.Prioritize(run=run, priority=priority, tenant=tenant):
            if not steering.prioritize(run, priority, tenant):
                raise ConfigError(f"no run {run!r}, and no thread of that name with an open run")
        case protocol.MoveWorkflow(workflow=workflow, backend=backend, tenant=tenant):
            if not steering.move(workflow, backend, tenant):
                whose = f" of tenant {tenant!r}" if tenant else "; a tenant's is named with its tenant (--tenant)"
                raise ConfigError(f"no thread {workflow!r}, and no open run of that id{whose}")
        case _:
            return ControlReply(ok=True, state=state(serving))
    return ControlReply(ok=True)
