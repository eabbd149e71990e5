"""How a server is reached: its addresses, the upgrade to a link, and the bytes under its frames, TLS or not."""

from __future__ import annotations

import http.client
import io
import ipaddress
import json
import socket
import ssl
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import NamedTuple, Protocol
from urllib.parse import urlsplit

from orla_lg.errors import ConfigError, shown
from orla_lg.link.messages import CORES_HEADER, PATH, UPGRADE
from orla_lg.openai_api.home import certificates

RIGHT = "http://HOST:PORT, https://HOST:PORT or unix:/PATH; several are separated by commas"

PORTS: Mapping[str, int] = {"http": 80, "https": 443}

DIAL_S = 5.0
"""How long a server may take for each step until it welcomes a replica."""

MOST_HEAD_BYTES = 16_384
"""Of the answer to an upgrade."""

READ_BYTES = 65_536

SHOWN_CHARS = 300
"""Of what a server answers, in a message."""


class Unwelcome(ConfigError):
    """A server answered, and will not take this link as it is: to ask again does not help."""


class NotReady(ConnectionError):
    """A server answered that it cannot take a link now.

    Args:
        text: Why.
        cores: URLs at which it says that the core is.
    """

    def __init__(self, text: str, cores: Sequence[str] = ()) -> None:
        super().__init__(text)
        self.cores = tuple(cores)


class ServerAddress(NamedTuple):
    """Where a server listens."""

    scheme: str
    host: str
    """A path, for a Unix socket."""
    port: int
    path: str
    """Of the link there."""
    text: str

    @property
    def is_local(self) -> bool:
        """Whether it is on this machine."""
        return self.scheme == "unix" or is_this_machine(self.host)

    @property
    def is_in_plain_text(self) -> bool:
        """Whether others can read on the way what goes there."""
        return self.scheme == "http" and not self.is_local

    @property
    def authority(self) -> str:
        """What the ``Host`` header says."""
        if self.scheme == "unix":
            return "localhost"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == PORTS[self.scheme] else f"{host}:{self.port}"


def is_this_machine(host: str) -> bool:
    """Whether a host's name or address is loopback's."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def addresses(url: object) -> tuple[ServerAddress, ...]:
    """Return the addresses in a URL, or in several that commas separate.

    Raises:
        ConfigError: One is none.
    """
    if not isinstance(url, str) or not url.strip():
        raise ConfigError(f"the server's URL must be {RIGHT}; got {shown(url)}")
    return tuple(_address(each.strip()) for each in url.split(","))


def are_of(wanted: Sequence[ServerAddress], url: str) -> bool:
    """Whether all addresses are those of the server at *url*, whose key goes nowhere else."""
    try:
        known = {address._replace(text="") for address in addresses(url)}
    except ConfigError:  # it names none
        return False
    return all(address._replace(text="") in known for address in wanted)


def _address(url: str) -> ServerAddress:
    if url.startswith("unix:"):
        path = url.removeprefix("unix:").removeprefix("//")
        if not path.startswith("/") or "\0" in path:
            raise ConfigError(f"the server's URL {shown(url)} is not unix:/PATH, with the whole path of a socket")
        return ServerAddress("unix", path, 0, PATH, url)
    try:
        parts = urlsplit(url)
        port, host = parts.port, parts.hostname
        (host or "").encode("idna")  # as it is resolved
    except ValueError as error:
        raise ConfigError(f"the server's URL {shown(url)} is not {RIGHT}: {error}") from None
    is_text = all(each.isprintable() and not each.isspace() for each in url)
    if parts.scheme not in PORTS or not host or parts.query or not is_text:
        raise ConfigError(f"the server's URL {shown(url)} is not {RIGHT}")
    if parts.username is not None or parts.password is not None:
        raise ConfigError(
            f"the server's URL {shown(url)} must have no user's name or password; a key is given as key"
        )
    above = parts.path.rstrip("/").removesuffix(PATH).removesuffix("/v1")
    return ServerAddress(parts.scheme, host, port or PORTS[parts.scheme], f"{above}{PATH}", url)


# The bytes


class Codec(Protocol):
    """What lies between frames and the network; not used by two threads at once."""

    def encode(self, data: bytes) -> bytes:
        """Return what is to be sent for *data*."""
        ...

    def decode(self, data: bytes) -> bytes:
        """Return what *data* brought."""
        ...

    def pending(self) -> bytes:
        """Return what must be sent although nothing was to be: answers of TLS itself."""
        ...


class Plain:
    """Nothing lies between."""

    def encode(self, data: bytes) -> bytes:  # noqa: D102
        return data

    decode = encode

    def pending(self) -> bytes:  # noqa: D102
        return b""


class Tls:
    """TLS over buffers: unlike an ``SSLSocket`` it lets one thread wait for bytes while another one sends."""

    def __init__(self, host: str) -> None:
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = certificates().wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    def shake_hands(self, connected: socket.socket) -> None:
        """Begin, on a socket that has a time-out; the server's certificate is verified.

        Raises:
            ssl.SSLCertVerificationError: It is not the host's, or nothing here trusts it.
        """
        while True:
            try:
                self._tls.do_handshake()
            except ssl.SSLWantReadError:
                connected.sendall(self._outgoing.read())
                data = connected.recv(READ_BYTES)
                if not data:
                    raise ConnectionResetError("the server hung up during TLS's handshake") from None
                self._incoming.write(data)
            else:
                connected.sendall(self._outgoing.read())
                return

    def encode(self, data: bytes) -> bytes:  # noqa: D102
        self._tls.write(data)
        return self._outgoing.read()

    def decode(self, data: bytes) -> bytes:  # noqa: D102
        self._incoming.write(data)
        parts = []
        try:
            while part := self._tls.read(READ_BYTES):
                parts.append(part)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLZeroReturnError:
            if not parts:
                raise ConnectionResetError("the server ended TLS") from None
        return b"".join(parts)

    def pending(self) -> bytes:  # noqa: D102
        return self._outgoing.read()


class Dialed(NamedTuple):
    """A connection that became a link."""

    socket: socket.socket
    codec: Codec
    address: ServerAddress
    began: bytes
    """What came behind the answer to the upgrade."""


def dial(address: ServerAddress, key: str | None, version: str) -> Dialed:
    """Connect, and ask for a link.

    Raises:
        Unwelcome: The server refuses it, or is none.
        OSError: It cannot be reached, or not now.
    """
    try:
        return _dial(address, key, version)
    except ssl.SSLCertVerificationError as error:
        raise Unwelcome(
            f"the server at {address.text} shows a certificate that is not trusted here: {error.verify_message}; "
            "SSL_CERT_FILE names further ones"
        ) from error
    except UnicodeError as error:  # a path or a key that no request can hold
        raise Unwelcome(f"the server at {address.text} cannot be asked for a link: {type(error).__name__}") from None


def _dial(address: ServerAddress, key: str | None, version: str) -> Dialed:
    if address.scheme == "unix":
        connected = socket.socket(socket.AF_UNIX)
        connected.settimeout(DIAL_S)
    else:
        connected = socket.create_connection((address.host, address.port), DIAL_S)
    try:
        codec: Codec = Plain()
        if address.scheme == "unix":
            connected.connect(address.host)
        else:
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if address.scheme == "https":
            codec = tls = Tls(address.host)
            tls.shake_hands(connected)
        connected.sendall(codec.encode(_request(address, key, version)))
        began = _upgraded(address, connected, codec, has_key=key is not None)
    except BaseException:
        connected.close()
        raise
    return Dialed(connected, codec, address, began)


def _request(address: ServerAddress, key: str | None, version: str) -> bytes:
    authorized = "" if key is None else f"Authorization: Bearer {key}\r\n"
    return (
        f"GET {address.path} HTTP/1.1\r\nHost: {address.authority}\r\nUser-Agent: orla_lg/{version}\r\n"
        f"Connection: Upgrade\r\nUpgrade: {UPGRADE}\r\n{authorized}\r\n"
    ).encode()


def _upgraded(address: ServerAddress, connected: socket.socket, codec: Codec, *, has_key: bool) -> bytes:
    """Read the answer to the upgrade, and return what came behind it."""
    came = b""
    while b"\r\n\r\n" not in came:
        data = connected.recv(READ_BYTES)
        if not data:
            raise _no_server(address, came) if came else NotReady(f"the server at {address.text} hung up")
        came += codec.decode(data)
        if not b"HTTP/".startswith(came[:5]) or len(came) > MOST_HEAD_BYTES:
            raise _no_server(address, came)
    head, _, began = came.partition(b"\r\n\r\n")
    status, headers = _head(address, head)
    if status == HTTPStatus.SWITCHING_PROTOCOLS and headers.get("upgrade", "").lower() == UPGRADE:
        return began
    raise _refused(address, status, headers, _body(connected, codec, headers, began), has_key=has_key)


def _head(address: ServerAddress, head: bytes) -> tuple[int, Mapping[str, str]]:
    first, _, rest = head.partition(b"\r\n")
    try:
        status = int(first.split()[1])
        headers = http.client.parse_headers(io.BytesIO(rest + b"\r\n\r\n"))
    except (IndexError, ValueError, http.client.HTTPException):
        raise _no_server(address, head) from None
    return status, {name.lower(): value for name, value in headers.items()}


def _body(connected: socket.socket, codec: Codec, headers: Mapping[str, str], began: bytes) -> str:
    """Return the text of a refusal, as far as it comes."""
    length = headers.get("content-length", "0")
    wanted = min(int(length) if length.isdecimal() else 0, MOST_HEAD_BYTES)
    try:
        while len(began) < wanted and (data := connected.recv(READ_BYTES)):
            began += codec.decode(data)
    except OSError:  # the status says enough
        pass
    return " ".join(_message(began).split())[:SHOWN_CHARS]


def _message(body: bytes) -> str:
    """Return what a refusal says: the message in JSON as our servers have it, else all of it."""
    text = body.decode("utf-8", "replace")
    try:
        message = json.loads(text)["error"]["message"]
    except (ValueError, TypeError, LookupError, RecursionError):
        return text
    return message if isinstance(message, str) else text


def _refused(
    address: ServerAddress, status: int, headers: Mapping[str, str], text: str, *, has_key: bool
) -> ConfigError | OSError:
    said = f": {text}" if text else ""
    if status == HTTPStatus.UNAUTHORIZED:
        fault = "does not take the key" if has_key else "wants a key, and none was given"
        return Unwelcome(
            f"the server at {address.text} {fault} (401){said}; a key of scope 'link' is given as "
            "Orla.remote(..., key=...), or in ORLA_SERVER_KEY; a gateway's, of scope 'gateway', stands there too"
        )
    if status == HTTPStatus.FORBIDDEN:
        return Unwelcome(f"the key is not for links to {address.text} (403){said}; it needs the scope 'link'")
    if status == HTTPStatus.MISDIRECTED_REQUEST:
        return Unwelcome(f"the server at {address.text} is not reached by that name (421){said}")
    if status == HTTPStatus.TOO_MANY_REQUESTS or status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        cores = [url.strip() for url in headers.get(CORES_HEADER, "").split(",") if url.strip()]
        return NotReady(f"the server at {address.text} takes no link now ({status}){said}", cores)
    return Unwelcome(
        f"what answers at {address.text} is no orla_lg server that takes links ({status} for {address.path}){said}; "
        "`orla-lg serve` is one"
    )


def _no_server(address: ServerAddress, came: bytes) -> ConfigError:
    return Unwelcome(f"what answers at {address.text} is no orla_lg server: it began with {shown(came[:40])}")
