"""What is asked of a running ``orla-lg serve`` by HTTP: where it is, which key goes there, and what it answers."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Self

import httpx
from pydantic import ValidationError

from orla_lg import config
from orla_lg.control import protocol
from orla_lg.control.protocol import ControlReply, Request
from orla_lg.control.state import ProcessState
from orla_lg.errors import ConfigError, OrlaError
from orla_lg.link.dialing import ServerAddress, addresses, are_of
from orla_lg.link.messages import PATH
from orla_lg.openai_api.home import certificates

STATE, CONTROL = "/v1/orla/state", "/v1/orla/control"
PATIENCE_S = 10.0
MOST_CHARS = 20_000
"""Of what a server says."""

WITHHELD = (
    f"; the key in {config.SERVER_KEY} was not sent, since this is neither the server in {config.SERVER} nor one on "
    "this machine: --key gives it"
)


class NoServer(OrlaError):
    """Nothing that is a server answers."""


class NotServing(OrlaError):
    """A server answers that it serves nothing now: it is a standby, or is ending."""


class ServerKey(NamedTuple):
    """The key that goes to a server."""

    secret: str | None
    withheld: bool = False
    """The environment has one, and it is not this server's."""

    @classmethod
    def of(cls, url: str | None, given: str | None) -> ServerKey:
        """Return the key for the server at *url*; ``None`` is the one that the environment names, or our own."""
        if given:
            return cls(given)
        known = config.server_key()
        return cls(known) if _has_our_key(url) else cls(None, withheld=known is not None)


def _has_our_key(url: str | None) -> bool:
    """Whether the key in the environment is for a server: the one named there, or one on this machine."""
    if not url:  # the environment names it, or our own configuration
        return True
    wanted, found = addresses(url), config.server()
    if found is not None and are_of(wanted, found.url):
        return True
    return all(each.is_local for each in wanted)


class ServerClient:
    """Asks a server; of several addresses the first at which one serves. Closes at the end of its ``with`` block.

    Args:
        url: As for ``Orla.remote``.
        key: What goes with each request.

    Raises:
        ConfigError: The URL is none.
    """

    def __init__(self, url: str, key: ServerKey, *, patience_s: float = PATIENCE_S) -> None:
        self._url, self._key = url, key
        self._left = list(addresses(url))
        self._patience_s = patience_s
        self._steers = False
        """Whether the key may."""
        self._http = self._client(self._left.pop(0))

    def _client(self, address: ServerAddress) -> httpx.Client:
        above = address.path.removesuffix(PATH)
        scheme = "http" if address.scheme == "unix" else address.scheme
        return httpx.Client(
            base_url=f"{scheme}://{address.authority}{above}",
            transport=httpx.HTTPTransport(uds=address.host) if address.scheme == "unix" else None,
            verify=certificates() if scheme == "https" else False,
            timeout=self._patience_s, trust_env=False,
        )  # fmt: skip

    # As the client of a control socket does it (``control.client``)

    def ask(self, request: Request, *, extra_s: float | None = 0.0) -> ControlReply:
        """Ask, and return the answer.

        Args:
            request: What for.
            extra_s: How much longer than usual the answer may take, in seconds; ``None``: for ever.

        Raises:
            ConfigError: It was refused, with the server's reason; or no answer came.
        """
        said = self._reply(self.send("POST", CONTROL, protocol.encode(request), extra_s=extra_s))
        self._steers = True
        return said

    def state(self) -> ProcessState:
        """Return the state now; a key that steered may do no more, and is shown it by the same route."""
        state = (self.ask(protocol.Look()) if self._steers else self._reply(self.send("GET", STATE))).state
        if state is None:
            raise ConfigError(f"{self._url}: the answer has no state in it")
        return state

    def watch(self, interval_s: float) -> Iterator[ProcessState]:
        """Yield the state every *interval_s* seconds; ends when the server does."""
        yield self.state()
        with contextlib.suppress(NoServer, NotServing):
            while True:
                time.sleep(interval_s)
                yield self.state()

    def _reply(self, said: Any) -> ControlReply:
        try:
            return ControlReply.model_validate(said)
        except ValidationError as error:
            raise ConfigError(f"{self._url}: the answer is not one of orla_lg's") from error

    # A request

    def send(self, method: str, path: str, content: bytes | None = None, *, extra_s: float | None = 0.0) -> Any:
        """Send a request, and return what its answer's JSON says.

        Raises:
            NoServer: Nothing answers, or what does is no server of ours.
            OrlaError: The server refuses.
        """
        while True:
            try:
                return self._sent(method, path, content, None if extra_s is None else self._patience_s + extra_s)
            except (NoServer, NotServing):
                if not self._left:
                    raise
            self._http.close()
            self._http = self._client(self._left.pop(0))

    def _sent(self, method: str, path: str, content: bytes | None, timeout_s: float | None) -> Any:
        headers = {} if content is None else {"content-type": "application/json"}
        if self._key.secret:
            headers["authorization"] = f"Bearer {self._key.secret}"
        try:
            answer = self._http.request(method, path, content=content, headers=headers, timeout=timeout_s)
            said: Any = answer.json()
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise NoServer(f"no server answers at {self._url} ({error}); --server says where it is") from error
        except ValueError as error:
            raise NoServer(f"{self._url} answers {answer.status_code}, and is no server of ours") from error
        if answer.is_success:
            return said
        fault = said.get("error") if isinstance(said, dict) else None
        text = str(fault.get("message") if isinstance(fault, dict) else fault or said)[:MOST_CHARS]
        if answer.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            raise NotServing(text)
        if answer.status_code == httpx.codes.UNAUTHORIZED and not self._key.secret:
            text = f"the server at {self._url} wants a key: --key KEY, or {config.SERVER_KEY}"
        raise ConfigError(text + (WITHHELD if answer.status_code == 401 and self._key.withheld else ""))

    def close(self) -> None:
        """Hang up. Idempotent."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
