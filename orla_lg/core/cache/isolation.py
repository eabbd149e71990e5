"""Which cached prefixes a call may find: those of all, or, where a backend isolates tenants, its own tenant's.

Engines that share one prefix cache among all are given a *salt* with each request: prompts that begin alike are found
only under the salt that they came with. What we believe of such a cache is kept apart likewise (``Ask.scope``). On
engines with slots a slot that held another tenant's tokens is not reused (``slots``).
"""

from __future__ import annotations

import base64
import hashlib
import logging
import secrets
import threading

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.call import Ask, Call
from orla_lg.core.engine.backend import Capability, Probe, Support

log = logging.getLogger("orla_lg")

KEEP_SALTS = 10_000
"""Those of the tenants seen last; any of them is made again as it was."""


class Salts:
    """A salt for each tenant, for as long as one ``Orla`` lives.

    A salt tells nothing of its tenant's name and cannot be guessed, since it is made with a secret that is drawn at
    random and never leaves the process: the engine's logs may show it, and a request that
    carries another tenant's salt finds that tenant's prefixes. After a restart, and in another process, a tenant's
    prefixes are computed again.
    """

    def __init__(self) -> None:
        self._secret = secrets.token_bytes(32)
        self._lock = threading.Lock()
        self._made = BoundedDict[str, str](KEEP_SALTS)

    def of(self, tenant: str) -> str:
        """Return a tenant's salt; calls of no tenant have none, and find what was asked without."""
        if not tenant:
            return ""
        with self._lock:
            if (salt := self._made.get(tenant)) is None:
                name = tenant.encode("utf-8", "surrogatepass")
                digest = hashlib.blake2b(name, key=self._secret, digest_size=32).digest()
                self._made.set(tenant, salt := base64.urlsafe_b64encode(digest).rstrip(b"=").decode())
            return salt


def can_isolate(probe: Probe) -> bool:
    """Whether an engine keeps tenants apart; one that says nothing of that does not."""
    return probe.capabilities.get(Capability.ISOLATE, Support.UNSUPPORTED).usable


class Isolation:
    """What one backend keeps apart: nothing, unless it isolates tenants."""

    def __init__(self, salts: Salts | None = None, *, on: bool = False) -> None:
        self.on = on
        self._salts = salts or Salts()
        self._warned = False

    def heed(self, backend: str, probe: Probe) -> None:
        """Warn, once, where an engine cannot do what is asked of it."""
        if self.on and not self._warned and not can_isolate(probe):
            self._warned = True
            log.warning(
                "backend %r is to isolate tenants, which its engine cannot: what one tenant's prompts began with is "
                "found by others (`orla-lg check` says more). This is said once", backend,
            )  # fmt: skip

    def scope(self, tenant: str) -> str:
        """Return the part of the cache in which a tenant's prompts are found; empty: the part of all."""
        return tenant if self.on else ""

    def within(self, call: Call) -> Ask:
        """Return a call's request with its prefixes as they are found here: its tenant's own, or those of all."""
        if not (self.on or call.ask.scope):
            return call.ask
        return call.ask.within(self.scope(call.identity.tenant))

    def salt(self, tenant: str) -> str:
        """Return the salt that a tenant's requests carry to an engine with one cache for all; empty: none."""
        return self._salts.of(tenant) if self.on else ""
