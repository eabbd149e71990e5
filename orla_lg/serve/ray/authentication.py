"""Ray's token authentication: set for what is started here, and asked of a cluster that is joined.

A Ray cluster without it lets everybody who reaches its ports run any code on all nodes. The token is Ray's business:
it is read by Ray, from its own variables and files, and never here.
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from orla_lg.errors import ConfigError
from orla_lg.serve.store.state_file import prepare, state_folder

MODE, TOKEN, TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
ON = "token"

ASK_S = 10.0
QUESTION = "/ray.rpc.NodeInfoGcsService/GetAllNodeInfo"
"""What a cluster without authentication answers to anybody: its nodes."""


def switch_on(*, may_make: bool) -> Path | None:
    """Have Ray authenticate this process and what it starts; returns the file of the token, where one is used.

    Args:
        may_make: Whether a token is made where there is none.

    Raises:
        ConfigError: It is switched off, or there is no token.
    """
    mode = os.environ.get(MODE, "")
    if mode.lower() not in ("", ON):
        raise ConfigError(
            f"{MODE} is {mode!r}: without authentication whatever reaches a port of Ray's runs code on all nodes; "
            f"set {MODE}={ON}"
        )
    os.environ[MODE] = ON
    if os.environ.get(TOKEN):
        return None
    named = os.environ.get(TOKEN_PATH)
    file = Path(named) if named else Path.home() / ".ray" / "auth_token"
    if _has_text(file):
        return file
    if named or not may_make:
        where = f"{TOKEN_PATH} names {file}, which has none" if named else f"neither {TOKEN} nor {file} has one"
        raise ConfigError(f"Ray needs the cluster's token, and {where}; {TOKEN_PATH} names a file with it")
    made = state_folder() / "ray_token"
    prepare(made, "Ray's token")
    _fill(made)
    os.environ[TOKEN_PATH] = str(made)
    return made


def _fill(file: Path) -> None:
    """Write a token into a file that has none; of several commands that begin at once, one does."""
    import fcntl

    with file.open("r+", encoding="ascii") as opened:
        fcntl.flock(opened, fcntl.LOCK_EX)
        if not opened.read().strip():
            opened.write(secrets.token_hex(32))


def _has_text(file: Path) -> bool:
    try:
        return bool(file.read_bytes().strip())
    except OSError:
        return False


def check_closed(address: str) -> None:
    """Refuse a cluster that does not ask for a token.

    Raises:
        ConfigError: It has no authentication, or does not answer.
    """
    import grpc  # comes with Ray's dashboard

    with _channel(address) as channel:
        ask = channel.unary_unary(QUESTION, request_serializer=bytes, response_deserializer=bytes)
        try:
            ask(b"", timeout=ASK_S)
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNAUTHENTICATED:
                return
            raise ConfigError(
                f"no head of a Ray cluster answers at {address} ({error.code().name}); its address is that of "
                "`ray start --head`, and a cluster with TLS needs RAY_USE_TLS=1 here too"
            ) from error
    raise ConfigError(
        f"the Ray cluster at {address} answers without a token: whatever reaches it runs code on all its nodes. "
        f"Start each of its nodes with {MODE}={ON} and {TOKEN_PATH} set"
    )


def _channel(address: str):  # type: ignore[no-untyped-def]  # grpc has no types
    """Return a channel as Ray opens one, without its token."""
    import grpc

    if os.environ.get("RAY_USE_TLS", "0").lower() not in ("1", "true"):
        return grpc.insecure_channel(address)
    files = [Path(os.environ[name]).read_bytes() for name in _TLS_FILES]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(*files))


_TLS_FILES = ("RAY_TLS_CA_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_SERVER_CERT")
"""Ray's variables, as gRPC takes their files."""
