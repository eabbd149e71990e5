"""The keys that callers send to a gateway, as its core knows them.

The gateway asks by a key's hash and refuses early what cannot go well; what holds is said by the core, which looks at
the key of each call again when it comes. So a key that is revoked ends there at once, and its limits hold over all
gateways.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from typing import Any

from orla_lg.core.boundary.bounded_dict import BoundedDict
from orla_lg.core.limits.limits import LimitScope
from orla_lg.core.steps import adrive
from orla_lg.errors import BackendUnavailable, ConfigError, OrlaError
from orla_lg.link.requests import CoreRequests
from orla_lg.serve.access.access import Access, Caller, Denied
from orla_lg.serve.access.budgets import HeldSlot
from orla_lg.serve.access.keys import AccessKey, KeyScope, digest, is_shaped

KEEP_KEYS = 10_000
FRESH_S = 2.0
"""After so many seconds a key is asked for again."""

AGAIN_S = 0.1
"""Until a core that does not answer is asked once more."""

NO_CORE = "the core of this gateway does not answer"

ANY_KEY = ""
"""Stands for the question whether there are keys at all."""


class CoreKeys:
    """What is known of keys; like a ``Keyring``, of the keys that were looked up.

    Args:
        requests: To the core.
        patience_s: How long a core is waited for.
    """

    def __init__(self, requests: CoreRequests, patience_s: float) -> None:
        self.clock = time.time
        self.any = True
        """Until the core says that there are none."""
        self._requests, self._patience_s = requests, patience_s
        self._known = BoundedDict[str, tuple[float, AccessKey | None]](KEEP_KEYS)
        self._by_id = BoundedDict[str, AccessKey](KEEP_KEYS)
        self._asking: dict[str, asyncio.Event] = {}

    def find(self, secret: str) -> AccessKey | None:
        """Return what is known of a key."""
        found = self._known.get(digest(secret)) if is_shaped(secret) else None
        return None if found is None else found[1]

    def by_id(self, key_id: str) -> AccessKey | None:
        """Return what is known of a key that was found before."""
        return self._by_id.get(key_id)

    def of_digest(self, sha256: str) -> AccessKey | None:
        """Return what is known of the key of a hash."""
        found = self._known.get(sha256)
        return None if found is None else found[1]

    async def look(self, secrets: Iterable[str]) -> None:
        """Ask the core for keys that are not known, or not lately.

        Raises:
            Denied: It does not answer, and one of them is not known.
        """
        shaped = {digest(secret) for secret in secrets if is_shaped(secret)}
        for sha256 in shaped or {ANY_KEY}:
            known = self._known.get(sha256)
            if known is None or time.monotonic() - known[0] > FRESH_S:
                await self._look_up(sha256, waits=known is None)

    async def _look_up(self, sha256: str, *, waits: bool) -> None:
        if (asking := self._asking.get(sha256)) is not None:
            if waits:
                await asking.wait()
                if self._known.get(sha256) is None:
                    raise Denied(503, NO_CORE, "server_error", 1.0)
            return
        asking = self._asking[sha256] = asyncio.Event()
        try:
            until_s = time.monotonic() + self._patience_s
            while True:
                try:
                    self._learn(sha256, await adrive(self._requests.steps("key", {"sha256": sha256})))
                except BackendUnavailable as error:
                    if not waits:
                        return  # the core looks at it again when the call comes there
                    if time.monotonic() >= until_s:
                        raise Denied(503, f"{NO_CORE}: {error}", "server_error", 1.0) from error
                    await asyncio.sleep(AGAIN_S)
                except OrlaError as error:  # the link's own key is no gateway's
                    raise Denied(403, str(error), "permission_denied") from error
                else:
                    return
        finally:
            del self._asking[sha256]
            asking.set()

    def _learn(self, sha256: str, said: Mapping[str, Any]) -> None:
        self.any = bool(said.get("any"))
        key = read_key(said.get("key"), sha256)
        self._known.set(sha256, (time.monotonic(), key))
        if key is not None:
            self._by_id.set(key.id, key)


def read_key(said: Any, sha256: str) -> AccessKey | None:
    """Return a key as the core told of it, without the limits, which the core applies; ``None``: there is none."""
    if not isinstance(said, Mapping):
        return None
    lists: dict[str, Any] = {
        name: None if said.get(name) is None else tuple(said[name]) for name in ("tenants", "backends", "stages")
    }
    scopes = tuple(KeyScope(each) for each in said.get("scopes", ()) if each in [*KeyScope])
    try:
        return AccessKey(
            str(said["id"]), str(said["name"]), sha256, scopes, tags=dict(said.get("tags") or {}),
            expires_s=said.get("expires_s"), revoked_s=said.get("revoked_s"), **lists,
        )  # fmt: skip
    except (ConfigError, KeyError, TypeError):  # of a newer core, and with nothing in it that is known here
        return None


class ForwardedAccess(Access):
    """What may come in at a gateway. What a key may use, and how much at once, is counted by the core."""

    def layers(self, caller: Caller) -> tuple[LimitScope, ...]:
        """Return none."""
        return ()

    def enter(self, caller: Caller, refuses: bool = True) -> HeldSlot:
        """Let the call in."""
        return HeldSlot()

    at_once = enter
