"""The server: what a test may do with it, what it counts, and what it keeps."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Self

from orla_lg.testing.faults.answers import in_common, words_of
from orla_lg.testing.faults.exchange import Exchange, Gone, Speaker
from orla_lg.testing.faults.http import Seen, read, reset
from orla_lg.testing.faults.reply import OK, Fault, Reply, reply_for

MODEL = "stub-model"
PATIENCE_S = 20.0
KEPT_PROMPTS = 64
CHAT = "/v1/chat/completions"


class FaultEngine:
    """An engine in a thread of this process, from ``with`` to its end.

    Args:
        script: How to treat the first requests, one each: a ``Fault``, a ``Reply``, or ``None`` for health.
        chances: The part of all later requests, 0 to 1, that meets each fault.
        seed: The same seed gives the same faults to the same sequence of requests.
        rule: Says how to treat a request after the script; ``None`` leaves it to chance.
        otherwise: How to treat all others.
        every_path: Faults meet probes and the like too, not only chat completions.
        slow_s: How late a slow engine is, in seconds.
        retry_after_s: When a busy engine asks to be asked again, in seconds.
        models: Names that ``/v1/models`` lists.
        any_model: Whether requests may name other models.
        context_tokens: Longer prompts are refused; ``None`` takes any.
        prefix_cache: Whether prompts stay cached where there are no slots; found by their ``cache_salt``, if any.
        slots: Looks like llama.cpp with so many slots; 0 is an engine without any.
        key: The API key it insists on; ``None`` takes any.
        speaks: What answers other wires than chat completions, by path: ``{"/v1/messages": answer}``. It gets a
            request's body and returns an answer's object, or the pieces of a stream.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        *,
        script: Iterable[Fault | Reply | None] = (),
        chances: Mapping[Fault, float] | None = None,
        seed: int = 0,
        rule: Callable[[Seen], Reply | None] | None = None,
        otherwise: Reply = OK,
        every_path: bool = False,
        slow_s: float = 2.0,
        retry_after_s: float = 1.0,
        models: tuple[str, ...] = (MODEL,),
        any_model: bool = False,
        context_tokens: int | None = 4096,
        prefix_cache: bool = True,
        slots: int = 0,
        key: str | None = None,
        speaks: Mapping[str, Speaker] | None = None,
        port: int = 0,
    ) -> None:
        self.script: deque[Fault | Reply | None] = deque(script)
        self.chances = dict(chances or {})
        self.rule = rule
        self.otherwise = otherwise
        self.every_path = every_path
        self.slow_s = slow_s
        self.retry_after_s = retry_after_s
        self.models = models
        self.any_model = any_model
        self.context_tokens = context_tokens
        self.key = key
        self.speaks = dict(speaks or {})
        self.port = port
        self.requests: list[Seen] = []
        self.in_flight = 0
        self.peak = 0
        self.collisions = 0
        """How often two calls sat in one slot at once."""
        self.erased = 0
        self.starts = 0
        """How often it began to listen, with an empty cache each time it was restarted."""
        self.keep_log = True
        """Off for benchmarks, where the log would grow without end."""
        self._random = random.Random(seed)
        self._slots: list[list[str]] = [[] for _ in range(slots)]
        self._prompts: deque[tuple[str, list[str]]] | None = deque(maxlen=KEPT_PROMPTS) if prefix_cache else None
        self._busy: set[int] = set()
        self._changed = threading.Condition()
        self._loop = asyncio.new_event_loop()
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name="fault-engine", daemon=True)

    # What a test does

    @property
    def url(self) -> str:
        """The OpenAI API's base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Self:
        self._thread.start()
        self.listen()
        return self

    def __exit__(self, *exc: object) -> None:
        self.refuse()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()

    def listen(self) -> None:
        """Accept connections, on the same port as before."""
        self._on_loop(self.serve())

    def refuse(self) -> None:
        """Be gone: close the port and every connection."""
        self._on_loop(self._stop())

    def restart(self) -> None:
        """Be gone and come back, with an empty cache."""
        self.refuse()
        self.forget()
        self.listen()

    def forget(self) -> None:
        """Empty the cache."""
        with self._changed:
            self._slots = [[] for _ in self._slots]
            if self._prompts is not None:
                self._prompts.clear()

    def _on_loop(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)

    @property
    def chats(self) -> list[Seen]:
        """The chat completions asked for."""
        return [seen for seen in self.requests if seen.path == CHAT]

    def wait(self, condition: Callable[[Self], bool]) -> None:
        """Wait until *condition* holds; it is looked at whenever a request comes or goes."""
        with self._changed:
            if not self._changed.wait_for(lambda: condition(self), PATIENCE_S):
                raise AssertionError("waited in vain for the engine")

    async def await_(self, condition: Callable[[Self], bool]) -> None:
        """``wait`` for a task."""
        await asyncio.to_thread(self.wait, condition)

    # Serving

    async def serve(self) -> None:
        """Listen, on the running loop."""
        self._server = await asyncio.start_server(
            self._connected, "127.0.0.1", self.port, reuse_address=True, backlog=1024
        )
        self.port = self._server.sockets[0].getsockname()[1]
        self.starts += 1

    async def _stop(self) -> None:
        if self._server is not None:
            self._server.close()
        await self.drop()

    async def drop(self, but: asyncio.Task[None] | None = None) -> None:
        """Reset every connection, except the one that *but* serves."""
        tasks = [task for task in self._tasks if task is not but]
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            while (seen := await read(reader)) is not None:
                await Exchange(self, seen, reader, writer).answer()
        except (ConnectionError, asyncio.IncompleteReadError, Gone) as end:
            if not (isinstance(end, Gone) and end.politely):
                reset(writer)
        except asyncio.CancelledError:
            reset(writer)  # only ``drop`` cancels; the connection dies with the engine
        finally:
            self._tasks.discard(task)
            writer.close()

    def reply_to(self, seen: Seen) -> Reply:
        """Return how to treat a request: what the key, the script, the rule and chance say, in this order."""
        if self.key is not None and seen.key != self.key:
            return Reply(status=401)
        is_call = seen.path == CHAT or (seen.path in self.speaks and bool(seen.body))
        if not is_call and not self.every_path:
            return OK
        if self.script:
            return self._reply(self.script.popleft())
        return (self.rule(seen) if self.rule is not None else None) or self._reply(self._chance())

    def _chance(self) -> Fault | None:
        drawn = self._random.random() if self.chances else 1.0
        for fault, chance in self.chances.items():
            if drawn < chance:
                return fault
            drawn -= chance
        return None

    def _reply(self, what: Fault | Reply | None) -> Reply:
        if isinstance(what, Fault):
            return reply_for(what, slow_s=self.slow_s, retry_after_s=self.retry_after_s)
        return self.otherwise if what is None else what

    def refusal(self, body: dict[str, Any]) -> tuple[int, str] | None:
        """Return status and message for a request that an engine in health refuses too."""
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages:
            return 400, "messages must be a list of messages"
        if not self.any_model and body.get("model") not in self.models:
            return 404, f"the model {body.get('model')!r} does not exist"
        tokens = len(words_of(messages))
        if self.context_tokens is not None and tokens > self.context_tokens:
            return 400, f"the prompt has {tokens} tokens, the context {self.context_tokens}"
        return None

    @contextlib.contextmanager
    def working(self, body: dict[str, Any]) -> Iterator[int]:
        """Count a chat completion while it is worked on; gives the number of cached tokens."""
        slot = body.get("id_slot")
        with self._changed:
            self.in_flight += 1
            self.peak = max(self.peak, self.in_flight)
            if slot is not None:
                self.collisions += slot in self._busy
                self._busy.add(slot)
            self._changed.notify_all()
        try:
            yield self._cached(slot, body)
        finally:
            with self._changed:
                self.in_flight -= 1
                if slot is not None:
                    self._busy.discard(slot)
                self._changed.notify_all()

    def _cached(self, slot: int | None, body: dict[str, Any]) -> int:
        if not isinstance(body.get("messages"), list):
            return 0
        words = words_of(body["messages"])
        if slot is not None and slot < len(self._slots):
            before, self._slots[slot] = self._slots[slot], words
            return 0 if body.get("cache_prompt") is False else in_common(words, before)
        if self._prompts is None:
            return 0
        salt = str(body.get("cache_salt") or "")
        cached = max((in_common(words, before) for under, before in self._prompts if under == salt), default=0)
        self._prompts.append((salt, words))
        return min(cached, len(words) - 1)  # the last token is computed to have something to go on from

    def note(self, seen: Seen) -> None:
        """Log a request."""
        with self._changed:
            if self.keep_log:
                self.requests.append(seen)
            self._changed.notify_all()

    def slot_action(self, seen: Seen) -> tuple[int, dict[str, Any]]:
        """Answer llama.cpp's ``/slots/N?action=erase``."""
        if not self._slots:
            return 404, error_body("not found", 404)
        index = int(seen.path.rpartition("/")[2])
        if seen.query.get("action") != "erase":
            return 400, error_body("Invalid action", 400)
        with self._changed:
            self.collisions += index in self._busy
            self.erased += 1
        count, self._slots[index] = len(self._slots[index]), []
        return 200, {"id_slot": index, "n_erased": count}

    def props(self) -> dict[str, Any] | None:
        """Answer llama.cpp's ``/props``."""
        if not self._slots:
            return None
        return {"total_slots": len(self._slots), "default_generation_settings": {"n_ctx": 4096}, "build_info": "stub"}


def error_body(message: str, status: int) -> dict[str, Any]:
    """Return an error as OpenAI words it."""
    return {"error": {"message": message, "type": "stub_error", "code": status}}
