"""A file of the server's own state: in the user's state folder, for the user alone, and no link to anything else.

It holds hashes of keys and what was spent, and is believed. So neither it nor its folder may be another user's to
change: what is found otherwise is refused and not repaired, since whatever it holds may be theirs already.
"""

from __future__ import annotations

import contextlib
import os
import stat
from pathlib import Path

from orla_lg.core.boundary.plain import is_path, shown
from orla_lg.errors import ConfigError

FILE_MODE, FOLDER_MODE = 0o600, 0o700
OTHERS = stat.S_IRWXG | stat.S_IRWXO
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def state_folder() -> Path:
    """Return the folder of this user's state: below ``XDG_STATE_HOME``, or ``~/.local/state``.

    Raises:
        ConfigError: This user has no home.
    """
    named = os.environ.get("XDG_STATE_HOME", "")
    try:
        base = Path(named) if Path(named).is_absolute() else Path.home() / ".local" / "state"
    except RuntimeError as error:
        raise ConfigError(f"this user has no home folder for the server's state ({error}); name a file") from error
    return base / "orla-lg"


def prepare(path: Path, where: str) -> os.stat_result:
    """Make the file and its folder where they are missing, and return what the file is.

    A file that is there is looked at, not opened: to close it would end the locks that SQLite has on it in this
    process. In a folder that only this user may write to, no other one can exchange it afterwards.

    Args:
        path: Of the file; folders above it that are missing are made.
        where: What a message begins with.

    Raises:
        ConfigError: They cannot be made, or others may change them.
    """
    if not is_path(path):
        raise ConfigError(f"{where}: {shown(path)!r} is no path of a file")
    try:
        folder = path.absolute().parent
        _make_folders(folder)
        _check_folder(folder, where)
        with contextlib.suppress(FileExistsError):
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, FILE_MODE))
        found = path.lstat()
    except OSError as error:
        raise ConfigError(f"{where}: {shown(path, 200)} cannot be used: {error.strerror or error}") from error
    _check_file(path, found, where)
    return found


def _make_folders(folder: Path) -> None:
    """Make what is missing, each for this user alone: ``mkdir`` leaves parents to the umask."""
    if not folder.exists():
        _make_folders(folder.parent)
        folder.mkdir(FOLDER_MODE, exist_ok=True)


def _check_folder(folder: Path, where: str) -> None:
    found = folder.stat()
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS_WRITE:
        # Also a sticky one: what SQLite writes beside its file others could put there first.
        raise ConfigError(
            f"{where}: others may write to the folder {shown(folder, 200)} (mode {stat.S_IMODE(found.st_mode):04o}, "
            f"user {found.st_uid}); name a file in a folder of your own, such as {folder / 'orla-lg'}, which is then "
            f"made, or run `chmod go-w` on it"
        )


def _check_file(path: Path, found: os.stat_result, where: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = "a symbolic link" if stat.S_ISLNK(found.st_mode) else "no file"
        raise ConfigError(f"{where}: {shown(path, 200)} is {kind}; name a file")
    if not hasattr(os, "geteuid"):
        return
    if found.st_uid != os.geteuid() or found.st_mode & OTHERS or found.st_nlink != 1:
        raise ConfigError(
            f"{where}: {shown(path, 200)} is not this user's alone (mode {stat.S_IMODE(found.st_mode):04o}, user "
            f"{found.st_uid}, {found.st_nlink} names); if you know what is in it, `chmod 600` it, else name another "
            "file"
        )
