"""A gateway without state in front of two pools: it answers for the models of all of them, over one address."""

from __future__ import annotations

import httpx

from tests.serve.in_thread import stateless
from tests.serve.pools.served import Pools, records, until


def test_a_gateway_without_state_reaches_all_pools(pools: Pools) -> None:
    pools.start()
    with stateless(pools.running["fast"].url) as running:
        cores = running.orla.core.serving.cores.by_pool
        until(lambda: "large" in cores and cores["large"].link.up)
        for model, pool in (("small-b", "fast"), ("big", "large"), ("big", "large")):
            body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
            answer = httpx.post(f"{running.url}/v1/chat/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-orla-backend"] == model
            until(lambda pool=pool: records(pools, pool))  # type: ignore[misc]
        until(lambda: len(records(pools, "large")) == 2)
        assert len(records(pools, "fast")) == 1
        names = [each["id"] for each in httpx.get(f"{running.url}/v1/models").json()["data"]]
        assert {"small-a", "small-b", "big"} <= set(names)
