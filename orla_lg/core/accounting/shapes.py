"""What a record's line has of its call so that the call can be replayed: when it came, lengths and keyed hashes.

No text. A hash of a prompt's piece is made with a random key of the file, so that a reader of the file can see which
prompts begin alike and cannot confirm a guessed one (``docs/decisions/record-hashes.md``).
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import stat
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any

from orla_lg.core.call import HASH_BYTES, Call

log = logging.getLogger("orla_lg")

KEY_BYTES = 32
KEY_MODE = 0o600
KEY_SUFFIX = ".key"
"""Of the file beside the records that holds their key."""

KEY_TRIES, KEY_PAUSE_S = 20, 0.005
"""Another process that makes the key has written it by then."""

KNOWN = 16_384
"""Pieces that are known to stand in the file; with more, all are written again."""

DIGITS = 6
"""Of seconds: microseconds."""


class Shapes:
    """Makes the ``shape`` of each call's line; used by the writing thread alone.

    Args:
        records: The records' file.
    """

    def __init__(self, records: Path) -> None:
        self._records = records
        self._key = b""
        self._key_id = ""
        self.process = secrets.token_hex(4)
        """Tells the times of one process's clock from those of another's."""
        self._known = set[int]()
        """Pieces that stand in the file, by their hash among us."""

    def forget(self) -> None:
        """Take no piece as written: lines were lost."""
        self._known.clear()

    def forked(self) -> None:
        """Be of another process: its times and its lines are its own."""
        self.process = secrets.token_hex(4)
        self.forget()

    def of(self, call: Call) -> dict[str, Any]:
        """Return the shape of a call that ended."""
        ask, standing = call.ask, call.standing
        shape: dict[str, Any] = {"process": self.process, "arrived_s": round(call.arrived_s, DIGITS)}
        if call.identity.run is not None:
            shape |= {"graph": standing.graph, "run_arrived_s": round(standing.arrived_s, DIGITS)}
        for name, value in (("max_tokens", ask.max_tokens), ("deadline_s", call.hints.deadline_s)):
            if value is not None:
                shape[name] = value
        if not ask.embeds:
            shape |= self._prompt(call)
        return shape

    def _prompt(self, call: Call) -> dict[str, Any]:
        """Return the prompt's pieces behind the last one that stands in the file."""
        pieces, known = call.ask.pieces, self._known
        if not self._key:
            self._key, self._key_id = _key_of(self._records)
        begin = next((at + 1 for at in range(len(pieces) - 1, -1, -1) if pieces[at][0] in known), 0)
        if len(known) + len(pieces) - begin > KNOWN:
            known.clear()
            begin = 0
        tail: list[list[Any]] = []
        for index in range(begin, len(pieces)):
            hashed, chars = pieces[index]
            known.add(hashed)
            named = self._keyed(hashed)
            tail.append([named, chars, 1] if call.ask.is_answer(index) else [named, chars])
        made: dict[str, Any] = {"key": self._key_id, "tail": tail}
        if begin:
            made |= {
                "after": self._keyed(pieces[begin - 1][0]),
                "after_chars": sum(chars for _, chars in pieces[:begin]),
            }
        return made

    def _keyed(self, hashed: int) -> str:
        return blake2b(hashed.to_bytes(HASH_BYTES), digest_size=HASH_BYTES, key=self._key).hexdigest()


def key_file(records: Path) -> Path:
    """Return where the key of a records file lies."""
    return records.with_name(records.name + KEY_SUFFIX)


def _key_of(records: Path) -> tuple[bytes, str]:
    """Return the key of a records file, and what tells it from other keys; one that cannot be kept is in no file."""
    try:
        key = (
            _kept(key_file(records)) if not records.exists() or records.is_file() else secrets.token_bytes(KEY_BYTES)
        )
    except OSError as error:
        log.warning(
            "%s cannot be used, so hashes of prompts in %s can be compared within this process only: %s",
            key_file(records), records, error,
        )  # fmt: skip
        key = secrets.token_bytes(KEY_BYTES)
    return key, blake2b(b"key of records", digest_size=4, key=key).hexdigest()


def _kept(file: Path) -> bytes:
    """Return the key in a file, which is made if there is none.

    Raises:
        OSError: It can be neither read nor made, it is no key, or others may read it.
    """
    for _ in range(KEY_TRIES):
        with contextlib.suppress(FileNotFoundError):
            if len(key := _read(file)) == KEY_BYTES:
                return key
            time.sleep(KEY_PAUSE_S)  # it is being written
            continue
        with contextlib.suppress(FileExistsError):
            _make(file, secrets.token_bytes(KEY_BYTES))
    raise OSError(f"it holds no key of {KEY_BYTES} bytes")


def _read(file: Path) -> bytes:
    descriptor = os.open(file, os.O_RDONLY | _NOFOLLOW)
    try:
        status = os.fstat(descriptor)
        if os.name == "posix" and (stat.S_IMODE(status.st_mode) & 0o077 or status.st_uid not in (os.geteuid(), 0)):
            raise PermissionError("others than its owner may read it (chmod 600 would be right), or it is another's")
        return os.read(descriptor, KEY_BYTES + 1)
    finally:
        os.close(descriptor)


def _make(file: Path, key: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NOFOLLOW, KEY_MODE)
    try:
        os.write(descriptor, key)
    finally:
        os.close(descriptor)


_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
