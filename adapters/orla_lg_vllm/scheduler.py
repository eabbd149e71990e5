"""vLLM's schedulers, with free blocks given away by band: ``--scheduler-cls orla_lg_vllm.scheduler.…``

``OrlaAsyncScheduler`` stands in for the scheduler that vLLM uses by default, ``OrlaScheduler`` for the one under
``--no-async-scheduling``. Each is vLLM's own with three hooks. Where the plugin cannot be trusted (``versions``)
or fails, they *are* vLLM's own: it says so once in the log, and the routes answer ``unsupported``.

This file runs inside the engine: it imports the standard library and vLLM only.
"""

from __future__ import annotations

import functools
import time
from typing import Any

from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.request import RequestStatus

from orla_lg_vllm.holding import HeldRequests
from orla_lg_vllm.keeper import Answer, Ending, Keeper
from orla_lg_vllm.segments import labels_of
from orla_lg_vllm.suspension import settings_of
from orla_lg_vllm.versions import objection

__all__ = ["OrlaAsyncScheduler", "OrlaScheduler"]

log = init_logger("vllm.orla_lg")  # below vLLM's own name, so that its settings hold

ENDED_BY_ITSELF = (RequestStatus.FINISHED_STOPPED, RequestStatus.FINISHED_LENGTH_CAPPED)


class _Banded:
    """The hooks; mixed in before one of vLLM's schedulers, and typed as little as those are."""

    keeper: Keeper | None = None
    objection = ""
    """Why there is no keeper."""

    # The arguments are vLLM's business: naming them would tie this class to one version before it can degrade.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        EngineCore.orla_kv = _orla_kv
        self.objection = objection(self)
        if self.objection:
            log.warning("orla_lg: the scheduler works as vLLM's own, because %s", self.objection)
            return
        host: Any = self
        settings = settings_of()
        self.keeper = Keeper(host.kv_cache_manager.block_pool, host.block_size, settings=settings)
        log.info("orla_lg: free KV blocks are given away by band, and kept, released and flushed by workflow")
        log.info("orla_lg: under pressure whole workflows are suspended: %s", settings or "no, it is switched off")

    def schedule(self, *args: Any, **kwargs: Any) -> Any:
        """Plan a step: first end the pins whose time is over, and keep out who must wait outside."""
        host: Any = super()
        if self.keeper is None:
            return host.schedule(*args, **kwargs)
        self._try(self.keeper.expire)
        holding = HeldRequests(self, self.keeper)
        self._try(functools.partial(holding.take_out, time.time()))
        try:
            output = host.schedule(*args, **kwargs)
        finally:
            holding.put_back()
        self._try(functools.partial(holding.note_begun, output))
        return output

    def _free_request_blocks(self, request: Any) -> None:
        """Note whose a request's blocks are, then give them back: all that ends or is pushed out comes by here."""
        if self.keeper is not None:
            self._try(functools.partial(self._note_end, request))
        host: Any = super()
        host._free_request_blocks(request)

    def reset_prefix_cache(self, *args: Any, **kwargs: Any) -> bool:
        """Forget the whole cache."""
        host: Any = super()
        done = bool(host.reset_prefix_cache(*args, **kwargs))
        if done and self.keeper is not None:
            self._try(self.keeper.emptied)
        return done

    def order(self, verb: str, workflow: str, ttl_s: float | None) -> Answer:
        """Carry out an order that came through the routes."""
        if self.keeper is None:
            return {"effect": "unsupported", "reason": self.objection}
        host: Any = self
        running = {
            name: host.kv_cache_manager.get_block_ids(name)[0]
            for name, request in host.requests.items()
            if workflow and _labels(request).workflow == workflow
        }
        return self.keeper.order(verb, workflow, ttl_s, {name: blocks for name, blocks in running.items() if blocks})

    def _note_end(self, request: Any) -> None:
        host: Any = self
        assert self.keeper is not None
        blocks = host.kv_cache_manager.get_block_ids(request.request_id)[0]
        whole = request.status in ENDED_BY_ITSELF
        tokens = request.num_prompt_tokens
        self.keeper.ends(
            Ending(request.request_id, _labels(request), blocks, tokens, request.arrival_time, whole=whole)
        )

    def _try(self, note: Any) -> None:
        """Keep the books; if that fails, give them up rather than the engine."""
        try:
            note()
        except Exception as error:  # whatever is wrong with our books, the engine serves on
            self.objection = f"its bookkeeping failed: {type(error).__name__} {error}"
            log.exception("orla_lg: the scheduler works as vLLM's own from now on, because %s", self.objection)
            if self.keeper is not None:
                self.keeper.give_up()
            self.keeper = None


class OrlaScheduler(_Banded, Scheduler):  # type: ignore[misc]
    """For ``--no-async-scheduling``."""


class OrlaAsyncScheduler(_Banded, AsyncScheduler):  # type: ignore[misc]
    """For vLLM's default, asynchronous scheduling."""


def _labels(request: Any) -> Any:
    parameters = request.sampling_params  # none for a pooling request
    return labels_of(parameters.extra_args if parameters is not None else None)


def _orla_kv(engine: Any, verb: str, workflow: str, ttl_s: float | None) -> Answer:
    """As a method of ``EngineCore``, what the routes call in every engine process."""
    answer: Answer = engine.scheduler.order(verb, workflow, ttl_s)
    return answer
