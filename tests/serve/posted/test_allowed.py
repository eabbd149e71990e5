"""Where what is posted may point: no host that clouds hand out credentials at, no key but the allowed ones, to no
other host."""

from __future__ import annotations

import pytest

from orla_lg import ConfigError
from orla_lg.config_tables import ServeTable
from orla_lg.serve.posted.allowed import Allowed

ANY = Allowed()
SOME = Allowed.of(
    ServeTable.model_validate(
        {
            "posted_hosts": ["*.example.com", "10.0.0.1:8000", "[::1]:9", "gpu-?"],
            "posted_key_envs": {"KEY": ["api.example.com", "10.0.0.1:8000"], "NONE": []},
        }
    )
)


@pytest.mark.parametrize(
    "url",
    [
        "http://169.254.169.254/latest", "http://169.254.1.1", "http://[fe80::1]/x", "http://[fe80::1%25eth0]/x",
        "http://[::ffff:169.254.169.254]/", "http://0.0.0.0/", "http://[::]/", "http://metadata.google.internal/",
        "http://METADATA.google.internal./", "http://2852039166/", "http://0xA9FEA9FE/", "http://0251.0376.0251.0376/",
        "http://169.254.43518/", "http://[fd00:ec2::254]/", "http://100.100.100.200/",
    ],
)  # fmt: skip
def test_where_credentials_are_handed_out_is_never_allowed_by_default(url: str) -> None:
    with pytest.raises(ConfigError, match="clouds hand out credentials"):
        ANY.check_url("endpoint", url)
    with pytest.raises(ConfigError, match="posted_hosts"):
        SOME.check_url("endpoint", url)


@pytest.mark.parametrize(
    "url",
    [
        "http://127.0.0.1:8000/v1",
        "http://10.1.2.3/v1",
        "https://api.openai.com/v1",
        "http://[::1]:8000",
        "http://gpu-7",
    ],
)
def test_engines_are_allowed_by_default_wherever_they_are(url: str) -> None:
    ANY.check_url("endpoint", url)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://h/x",
        "h:80",
        "http://",
        "http:///x",
        "http://user@h/",
        "http://user:key@h/",
        "http://h:99999/",
        "//h",
        "",
    ],
)
def test_what_is_no_url_of_http_is_refused(url: str) -> None:
    for allowed in (ANY, SOME):
        with pytest.raises(ConfigError, match="endpoint"):
            allowed.check_url("endpoint", url)


def test_named_hosts_alone_are_allowed() -> None:
    for url in (
        "https://api.EXAMPLE.com/v1",
        "http://10.0.0.1:8000",
        "http://[::1]:9/",
        "http://gpu-7:1/",
        "http://a.b.example.com",
    ):
        SOME.check_url("endpoint", url)
    for url in (
        "http://example.com",
        "http://10.0.0.1/",
        "http://[::1]:8/",
        "http://gpu-77/",
        "http://example.com.evil.org/",
    ):
        with pytest.raises(ConfigError, match="not among"):
            SOME.check_url("endpoint", url)


def test_a_name_is_looked_up_where_there_is_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("169.254.169.254", 0))])
    ANY.check_url("endpoint", "http://rebound.example.com")
    with pytest.raises(ConfigError, match="credentials"):
        ANY.check_url("endpoint", "http://rebound.example.com", resolves=True)


def test_a_key_goes_where_its_variable_says_and_nowhere_else() -> None:
    SOME.check_key("KEY", "https://api.example.com/v1")
    SOME.check_key("KEY", "http://10.0.0.1:8000/v1")
    for variable, url, said in (
        ("HOME", "https://api.example.com", "must not be named"),
        ("KEY", "https://other.example.com", "must not go to"),
        ("KEY", "http://10.0.0.1:8001", "must not go to"),
        ("NONE", "https://api.example.com", "must not go to"),
    ):
        with pytest.raises(ConfigError, match=said):
            SOME.check_key(variable, url)
    with pytest.raises(ConfigError, match="posted_key_envs"):
        ANY.check_key("KEY", "https://api.example.com/v1")
