"""The directory of cores in a store on Redis or Valkey, as a replica reads it while it looks for its core."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from orla_lg.errors import ConfigError
from orla_lg.link.dialing import ServerAddress, addresses
from orla_lg.link.places import CORES, MOST_PLACES, STANDBYS, CorePlace, read_place
from orla_lg.link.redis_keys import SCHEMES, RedisAddress, entries


class RedisDirectory:
    """A store whose directory names the cores (``following.DirectorySource``).

    Args:
        address: Where it is.

    Raises:
        ConfigError: redis-py is missing, or does not take the URL.
    """

    def __init__(self, address: RedisAddress) -> None:
        self._address = address
        self.text, self.is_believed, self.is_local = address.text, address.is_believed, address.is_local
        self._client: Any = address.connect()
        self._lock = threading.Lock()

    def read(self) -> Sequence[CorePlace]:
        """Return the cores and standbys that stand there.

        Raises:
            OSError: It does not answer.
        """
        import redis

        with self._lock:
            try:
                found = [
                    each
                    for prefix in (CORES, STANDBYS)
                    for each in list(entries(self._client, self._address, prefix).items())[:MOST_PLACES]
                ]
            except (redis.RedisError, OSError, ValueError) as error:
                raise ConnectionError(f"the store at {self.text} does not say where cores are: {error}") from error
            finally:
                self._client.close()  # it is asked while there is no core, and seldom
        return [place for key, value in found if (place := read_place(key, value)) is not None]


def directory_at(url: str) -> RedisDirectory:
    """Return the directory at a URL.

    Raises:
        ConfigError: It is none, or cannot be read from here.
    """
    return RedisDirectory(RedisAddress.parse(url, "the server's URL"))


def named(url: object) -> tuple[Sequence[ServerAddress], Sequence[str]]:
    """Return the servers, and the URLs of stores, in a URL or in several that commas separate.

    Raises:
        ConfigError: One is neither.
    """
    if not isinstance(url, str):
        return addresses(url), ()
    each = [part.strip() for part in url.split(",")]
    stores = [part for part in each if part.startswith(SCHEMES)]
    servers = [part for part in each if not part.startswith(SCHEMES)]
    return addresses(",".join(servers)) if servers else (), stores


def are_named(url: object, known: str) -> bool:
    """Whether all that a URL names is named by *known* too, whose key goes nowhere else."""
    try:
        (servers, stores), there = named(url), named(known)
    except ConfigError:  # it names none
        return False
    return set(stores) <= set(there[1]) and {each._replace(text="") for each in servers} <= {
        each._replace(text="") for each in there[0]
    }
