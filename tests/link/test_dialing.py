"""A server is reached, or it is clear at once why not."""

from __future__ import annotations

import socket
import ssl
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from orla_lg import BackendUnavailable, ConfigError, Orla
from orla_lg.link import dialing
from orla_lg.link.connection import Link
from orla_lg.link.dialing import addresses
from orla_lg.link.messages import End, Enter, Hello, Ready, Welcome
from tests.conftest import at
from tests.link.conftest import ENGINE_KEY
from tests.link.scripted import ScriptedCore, eventually
from tests.link.test_calls import graph, hi
from tests.stub_engine import StubEngine

Replica = Callable[..., Orla]


@pytest.mark.parametrize(
    ("url", "authority", "path"),
    [
        ("http://host:8081", "host:8081", "/v1/orla/link"),
        ("http://host", "host", "/v1/orla/link"),
        ("https://host:443/", "host", "/v1/orla/link"),
        ("http://[::1]:8081/v1", "[::1]:8081", "/v1/orla/link"),
        ("https://gate/orla", "gate", "/orla/v1/orla/link"),
        ("unix:/run/orla.sock", "localhost", "/v1/orla/link"),
        ("unix:///run/orla.sock", "localhost", "/v1/orla/link"),
    ],
)
def test_addresses(url: str, authority: str, path: str) -> None:
    (address,) = addresses(url)
    assert (address.authority, address.path) == (authority, path)


def test_several_addresses_stand_in_order() -> None:
    assert [each.host for each in addresses("http://one:1, http://two:2")] == ["one", "two"]


@pytest.mark.parametrize(
    "url",
    ["", " ", "host:8081", "ftp://host", "http://", "http://host:port", "unix:run", "http://u:secret@host", "http://h?x=1",
     "http://one:1,", None, 3],
)  # fmt: skip
def test_wrong_urls_are_refused_without_their_passwords(url: Any) -> None:
    with pytest.raises(ConfigError, match="the server's URL") as caught:
        addresses(url)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 11\r\n\r\nno such key",
            "does not take the key .*no such key",
        ),
        (
            b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 39\r\n\r\n{"error": {"message": "it is revoked"}}',
            r"does not take the key \(401\): it is revoked; a key of scope 'link' is given as Orla\.remote",
        ),
        (b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 12\r\n\r\n{"error": 3}', r'.401.: {"error": 3};'),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", "needs the scope 'link'"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "is no orla_lg server that takes links .404"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", "is no orla_lg server that takes links .200"),
        (b"HTTP/1.1 421 Misdirected Request\r\n\r\n", "not reached by that name"),
        (b"SSH-2.0-OpenSSH_9.6\r\n", "is no orla_lg server: it began with b'SSH-2.0"),
        (b"HTTP/1.1 nonsense\r\n\r\n", "is no orla_lg server"),
        (b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n\r\n", "is no orla_lg server"),
        (b"x" * 100_000, "is no orla_lg server"),
    ],
)
def test_what_is_no_server_is_told_at_once(core: ScriptedCore, answer: bytes, text: str) -> None:
    core.answer = answer
    began_s = time.monotonic()
    with pytest.raises(ConfigError, match=text) as caught:
        Orla.remote(core.url, key="a-wrong-key-of-mine")
    assert type(caught.value) is ConfigError and "Unwelcome" not in "".join(traceback.format_exception(caught.value))
    assert time.monotonic() - began_s < 8.0, "of the 10 s for which a welcome is waited for"


def test_keys_are_sent_and_never_shown(core: ScriptedCore, replica: Replica) -> None:
    replica(key="secret-key-of-this-link")
    assert "Authorization: Bearer secret-key-of-this-link" in core.heads[0]
    core.answer = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(ConfigError) as caught:
        Orla.remote(core.url, key="secret-key-of-this-link")
    assert "secret-key" not in str(caught.value)
    with pytest.raises(ConfigError, match="key"):
        Orla.remote(core.url, key="two\nlines")


def test_another_protocol_is_told_with_both_numbers(core: ScriptedCore) -> None:
    core.protocol = 7
    with pytest.raises(ConfigError, match=r"version 9\.9. speaks protocol 7 .*this replica is to be updated"):
        Orla.remote(core.url)


def test_a_server_that_is_not_there(core: ScriptedCore) -> None:
    core.gone()
    with pytest.raises(BackendUnavailable, match=r"no orla_lg server answers at http.*refused.*orla-lg serve"):
        Orla.remote(core.url, core_patience_s=0.2)


def test_where_calls_without_a_core_fail_it_is_not_waited_for_long(
    core: ScriptedCore, monkeypatch: pytest.MonkeyPatch
) -> None:
    patience = list[float]()

    def none_answers(self: Link, hello: Hello, patience_s: float) -> Welcome:
        patience.append(patience_s)
        raise BackendUnavailable("none answers")

    monkeypatch.setattr(Link, "open", none_answers)
    choices: list[dict[str, Any]] = [
        {},
        {"on_core_lost": "direct"},
        {"on_core_lost": "fail"},
        {"core_patience_s": 0.5},
    ]
    for settings in choices:
        with pytest.raises(BackendUnavailable):
            Orla.remote(core.url, **settings)
    assert patience == [10.0, 10.0, 2.0, 0.5]


def test_a_server_that_changes_places_is_waited_for(core: ScriptedCore, replica: Replica) -> None:
    core.answer = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"
    threading.Timer(0.1, lambda: setattr(core, "answer", None)).start()
    replica()


def test_the_second_address_is_tried(core: ScriptedCore, engine: StubEngine, replica: Replica) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    replica(f"http://127.0.0.1:{port},{core.url}").wrap(graph(engine)).invoke(hi())
    core.wait(End)


def test_engines_keys_are_this_processs(core: ScriptedCore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(ENGINE_KEY)
    with pytest.raises(ConfigError, match=rf"backend 'main': the environment variable '{ENGINE_KEY}' is not set"):
        Orla.remote(core.url)


def test_a_backend_without_its_key_is_left_to_others(
    core: ScriptedCore, engine: StubEngine, replica: Replica, caplog: pytest.LogCaptureFixture
) -> None:
    orla = replica()
    core.backends = (*core.backends, at(engine, "later"))
    core.key_env = "NOT_SET_HERE"
    core.drop()
    core.wait(Ready, 2)
    assert "'NOT_SET_HERE' is not set" in caplog.text
    assert not orla.core.serving.schedulers
    core.key_env = ENGINE_KEY
    core.line.send(core.welcome())  # an update
    eventually(lambda: set(orla.core.serving.schedulers) == {"main", "later"})
    orla.wrap(graph(engine)).invoke(hi())
    assert core.wait(Enter).able is None


def test_the_environment_names_the_server(
    core: ScriptedCore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "orla.toml").write_text('[backends.light]\nurl = "http://127.0.0.1:9/v1"\n')
    with Orla.from_env() as local:
        assert local.source.endswith("orla.toml")
    monkeypatch.setenv("ORLA_SERVER", core.url)
    monkeypatch.setenv("ORLA_SERVER_KEY", "key-of-the-environment")
    with Orla.from_env() as orla:
        assert orla.source == "ORLA_SERVER" and list(orla.core.serving.schedulers) == ["main"]
    assert "Bearer key-of-the-environment" in core.heads[0]
    with Orla.remote():
        pass
    monkeypatch.delenv("ORLA_SERVER")
    with pytest.raises(ConfigError, match=r"no server is named.*ORLA_SERVER"):
        Orla.remote()


@pytest.mark.parametrize(
    ("server", "sent"),
    [
        (None, True), ("", True), ("{url}", True), ("{url}/v1/", True), ("http://127.0.0.1:9,{url}", True),
        ("http://127.0.0.1:9", False), ("nonsense", False),
    ],
)  # fmt: skip
def test_the_environments_key_goes_to_the_server_it_stands_beside(
    core: ScriptedCore, monkeypatch: pytest.MonkeyPatch, server: str | None, sent: bool
) -> None:
    monkeypatch.delenv("ORLA_SERVER", raising=False)
    monkeypatch.setenv("ORLA_SERVER_KEY", "key-of-the-environment")
    if server is not None:
        monkeypatch.setenv("ORLA_SERVER", server.format(url=core.url))
    with Orla.remote(core.url):
        pass
    assert ("Bearer key-of-the-environment" in core.heads[-1]) is sent
    with Orla.remote(core.url, key="key-of-the-code"):
        pass
    assert "Bearer key-of-the-code" in core.heads[-1]
    monkeypatch.setenv("ORLA_SERVER_KEY", "")
    core.answer = b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n"
    with pytest.raises(ConfigError, match=r"wants a key, and none was given \(401\); .*ORLA_SERVER_KEY"):
        Orla.remote(core.url)


@pytest.mark.parametrize(
    "settings", [{"on_core_lost": "panic"}, {"core_patience_s": 0}, {"core_patience_s": "1"}, {"keep_records": -1}]
)
def test_wrong_arguments(core: ScriptedCore, settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Orla.remote(core.url, **settings)
    assert not core.heads
    with pytest.raises(ConfigError, match=r"'policy', which belongs elsewhere.*orla-lg serve.*module:name"):
        Orla.remote(core.url, policy="fcfs")  # type: ignore[call-arg]
    with pytest.raises(ConfigError, match=r"'core_patience', did you mean|did you mean 'core_patience_s'"):
        Orla.remote(core.url, core_patience=3)  # type: ignore[call-arg]


def test_a_unix_socket(engine: StubEngine, tmp_path: Path, replica: Replica) -> None:
    with ScriptedCore(at(engine), unix=str(tmp_path / "s")) as core:
        orla = replica(core.url)
        orla.wrap(graph(engine)).invoke(hi())
        core.wait(End)
        orla.close()


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    built = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(7).not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    file = tmp_path_factory.mktemp("tls") / "both.pem"
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(private + built.public_bytes(serialization.Encoding.PEM))
    return file


@pytest.fixture
def tls_port(core: ScriptedCore, certificate: Path) -> Iterator[int]:
    """Put TLS in front of the scripted core."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    core.tls = context
    yield int(core.url.rpartition(":")[2])


def test_tls_is_verified(
    core: ScriptedCore, engine: StubEngine, replica: Replica, tls_port: int, certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    url = f"https://localhost:{tls_port}"
    with pytest.raises(ConfigError, match="certificate that is not trusted"):
        Orla.remote(url)
    trusting = ssl.create_default_context(cafile=str(certificate))
    monkeypatch.setattr(dialing, "certificates", lambda: trusting)
    orla = replica(url)
    orla.wrap(graph(engine)).invoke(hi())
    core.wait(End)
    core.drop()
    core.wait(Hello, 2)
    with pytest.raises(ConfigError, match="certificate that is not trusted"):
        Orla.remote(f"https://127.0.0.1:{tls_port}")
