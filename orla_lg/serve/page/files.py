"""What the page is made of, as it is sent: read once, known by name, and under headers that allow nothing else."""

from __future__ import annotations

from functools import cache
from importlib import resources

Header = tuple[bytes, bytes]

KINDS = {
    ".html": b"text/html; charset=utf-8",
    ".css": b"text/css; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}

CONTENT_POLICY = "; ".join([
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "img-src 'self'", "connect-src 'self'",
    "form-action 'self'", "base-uri 'none'", "frame-ancestors 'none'", "require-trusted-types-for 'script'",
    "trusted-types 'none'",
])  # fmt: skip
"""Nothing from elsewhere, nothing inline, no text of a name ever read as HTML, in no other page's frame."""

GUARDED: list[Header] = [
    (b"cache-control", b"no-store"),
    (b"content-security-policy", CONTENT_POLICY.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"x-frame-options", b"DENY"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-opener-policy", b"same-origin"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
]

INDEX = "index.html"


@cache
def files() -> dict[str, tuple[bytes, bytes]]:
    """Return the kind and the content of each file, by name."""
    folder = resources.files("orla_lg.serve.page") / "static"
    found = {}
    for each in folder.iterdir():
        kind = KINDS.get("." + each.name.rpartition(".")[2])
        if kind is not None:
            found[each.name] = kind, each.read_bytes()
    return found
