"""What travels to an actor: the text of a configuration, and what the command line and its place say over it."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from orla_lg.config_file import CONFIG_NAME
from orla_lg.serve.settings import ListenAddress, ServeSettings, settings


@dataclass(frozen=True, slots=True)
class ShippedSettings:
    """Settings of one server on their way to the node that it runs on.

    Keys of engines do not travel: a node has them in the variables that the configuration names. Where the same file
    stands on the node, it is used there, with what lies beside it; elsewhere a copy is.
    """

    path: str = ""
    """Of the configuration, where it was read; empty: there is none."""
    text: str = field(default="", repr=False)
    host: str | None = None
    """Where to listen; ``None``: at the node's own address."""
    port: int = 0
    store: str | None = field(default=None, repr=False)
    """Over that of the file."""
    pool: str | None = None
    """Of the file, that the server is of."""
    before: str = field(default="", repr=False)
    """Of a gateway: where its cores are, as ``Orla.remote`` takes it; empty: it is a core, or a standby."""

    @property
    def fingerprint(self) -> str:
        """Of all of it: two actors with the same one serve alike."""
        return hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=8).hexdigest()

    @contextlib.contextmanager
    def opened(self, node_address: str) -> Iterator[ServeSettings]:
        """Give the settings, as they are on a node, for as long as the block lasts.

        Raises:
            ConfigError: They are wrong here: a variable is not set, a module is not there.
        """
        with contextlib.ExitStack() as ending:
            file = self._file(ending) if self.path else None
            chosen = settings(
                None if file is None else str(file),
                store=self.store,
                pool=self.pool,
                standby=True,
                reads_file=file is not None,
            )
            listen = ListenAddress(node_address if self.host is None else self.host, self.port)
            update = dict[str, Any]()
            if listen.is_any:
                update |= {"advertise": chosen.table.advertise or (_url(chosen, node_address, self.port),)}
                update |= {"names": (*chosen.table.names, node_address)}
            yield replace(chosen, listen=listen, table=chosen.table.model_copy(update=update))

    def _file(self, ending: contextlib.ExitStack) -> Path:
        there = Path(self.path)
        with contextlib.suppress(OSError, ValueError):
            if there.read_text(encoding="utf-8") == self.text:
                return there
        folder = Path(ending.enter_context(tempfile.TemporaryDirectory(prefix="orla-lg-")))
        copy = folder / CONFIG_NAME
        copy.write_text(self.text, encoding="utf-8")
        copy.chmod(0o600)
        return copy


def _url(chosen: ServeSettings, node_address: str, port: int) -> str:
    return ListenAddress(node_address, port).url(tls=chosen.has_tls)
