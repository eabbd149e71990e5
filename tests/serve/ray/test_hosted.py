"""A server on a thread of another program: begun, begun again, ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx

from orla_lg.errors import ConfigError
from orla_lg.serve.http.listening import Listening
from orla_lg.serve.ray.hosted import HostedServer, core, gateway
from orla_lg.serve.settings import ListenAddress, ServeSettings, settings
from tests.serve.fixtures import until

PATIENCE_S = 20.0


def of(chosen: Callable[[], ServeSettings]) -> Callable[[], contextlib.AbstractContextManager[ServeSettings]]:
    @contextlib.contextmanager
    def opened() -> Iterator[ServeSettings]:
        yield chosen()

    return opened


def at(folder: Path, port: int = 0) -> ServeSettings:
    chosen = settings(store=str(folder / "s.db"), standby=True, reads_file=False)
    return replace(chosen, listen=ListenAddress(port=port))


@contextlib.contextmanager
def hosting(chosen: Callable[[], ServeSettings], crashed: Callable[[], None] = int) -> Iterator[HostedServer]:
    server = HostedServer(of(chosen), core, crashed)
    server.start()
    try:
        yield server
    finally:
        assert server.end(PATIENCE_S)


def test_it_says_how_it_is_from_its_begin_to_its_end(tmp_path: Path) -> None:
    with hosting(lambda: at(tmp_path)) as server:
        until(lambda: server.status().state == "ready")
        status = server.status()
        assert (status.epoch, status.pid) == (1, os.getpid())
        assert httpx.get(f"{status.url}/readyz").is_success
        with hosting(lambda: at(tmp_path)) as second:
            until(lambda: second.status().state == "standby")
            assert second.status().epoch == 0
            assert server.end(PATIENCE_S)
            until(lambda: second.status().epoch == 2)
    assert server.status().state == "ended"


def test_a_port_that_is_taken_is_waited_for(tmp_path: Path) -> None:
    taken = Listening(ListenAddress(port=0))
    port = taken.port
    try:
        with hosting(lambda: at(tmp_path, port)) as server:
            until(lambda: server.status().state == "failed")
            assert "is taken" in server.status().fault
            taken.close()
            until(lambda: server.status().state == "ready")
            assert server.status().fault == ""
    finally:
        taken.close()


def test_what_is_wrong_on_the_node_is_said(tmp_path: Path) -> None:
    def wrong() -> ServeSettings:
        raise ConfigError("the variable ENGINE_KEY is not set")

    with hosting(wrong) as server:
        until(lambda: "ENGINE_KEY" in server.status().fault)


def test_a_replaced_server_is_begun_again_in_its_process(tmp_path: Path) -> None:
    with hosting(lambda: at(tmp_path)) as server:
        until(lambda: server.status().state == "ready")
        with server._lock:
            running, loop = server._server, server._loop
        assert running is not None and loop is not None
        loop.call_soon_threadsafe(running.ending.replaced)
        until(lambda: server.status().epoch == 2)


def test_a_fault_of_its_own_ends_the_process(tmp_path: Path) -> None:
    crashed = threading.Event()

    def broken() -> ServeSettings:
        raise AssertionError("a fault of ours")

    server = HostedServer(of(broken), core, crashed.set)
    server.start()
    assert crashed.wait(PATIENCE_S)
    assert server.end(PATIENCE_S)


def test_a_gateway_is_hosted_before_a_core(tmp_path: Path) -> None:
    with hosting(lambda: at(tmp_path)) as behind:
        until(lambda: behind.status().state == "ready")
        server = HostedServer(of(lambda: at(tmp_path)), gateway(behind.status().url), int)
        server.start()
        try:
            until(lambda: server.status().state == "ready")
            assert server.status().epoch == 0
            assert httpx.get(f"{server.status().url}/v1/models").is_success
        finally:
            assert server.end(PATIENCE_S)


def test_it_ends_although_its_server_has_ended_just_now(tmp_path: Path) -> None:
    server = HostedServer(of(lambda: at(tmp_path)), core, int)
    over = asyncio.new_event_loop()
    over.close()
    server._server, server._loop = cast(Any, SimpleNamespace(end=int)), over
    server._thread = threading.Thread(target=int)
    server.start()
    assert server.end(PATIENCE_S)
