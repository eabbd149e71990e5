"""The secret by which cores on one store know each other: it stands in that store, and lets one look, not call."""

from __future__ import annotations

import hmac
import secrets

from orla_lg.serve.access.access import Caller, Headers, credentials
from orla_lg.serve.store.store import ABSENT, Conflict, Store

KEY = "secret/cores"

MARK = "orla-core-"
"""What it begins with, so that no other key is taken for it."""

OTHER_CORE = Caller(None, "another pool's core", tenants=(), scopes=frozenset())
"""It sees backends, and makes no calls."""


class CoreSecret:
    """The secret of all cores on one store.

    Args:
        store: The whole of it, not one pool's part.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._known: str | None = None

    def get(self) -> str:
        """Return the secret; the first core on a store makes it.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        while self._known is None:
            if (found := self._store.get(KEY)) is not None:
                self._known = found.value.decode()
                break
            try:
                self._store.put(KEY, f"{MARK}{secrets.token_urlsafe(32)}".encode(), expected=ABSENT)
            except Conflict:
                continue
        return self._known

    def is_sent(self, headers: Headers) -> bool:
        """Whether a request comes from another core on this store.

        Raises:
            StoreUnavailable: The store does not answer.
        """
        sent = [each for each in credentials(headers) if each.startswith(MARK)]
        return any(self._is_same(each) for each in sent)

    def _is_same(self, sent: str) -> bool:
        return hmac.compare_digest(sent.encode(), self.get().encode())
