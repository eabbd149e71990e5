"""The tests on a real Ray cluster, in namespaces of their own: ``python -m tests.serve.ray.run [pytest's options]``.

Ray listens on all interfaces, keeps its files in /tmp, and leaves processes where a test is cut off. So the tests run
in a network without other machines, with a /tmp of their own, and as process 1 of a namespace that ends with it.
"""

from __future__ import annotations

import fcntl
import importlib.util
import os
import socket
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FILES = [Path(__file__).resolve().with_name(name) for name in ("test_authentication.py", "test_on_ray.py")]
"""Those that Ray is needed for, or what comes with it."""

INSIDE = "ORLA_TEST_RAY_INSIDE"
UNSHARE = ("unshare", "--net", "--pid", "--mount", "--mount-proc", "--fork", "--kill-child")
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1


def why_not() -> str:
    """Return why the tests cannot run here; empty if they can."""
    if importlib.util.find_spec("ray") is None:
        return "Ray is not installed: `make test-ray` installs it"
    try:
        done = subprocess.run([*UNSHARE, "true"], capture_output=True, text=True, timeout=20, check=False)
    except OSError as error:
        return f"no network namespace can be made: {error}"
    return "" if done.returncode == 0 else f"no network namespace can be made: {done.stderr.strip()}"


def raise_loopback() -> None:
    """Have the one interface of a new network namespace up."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        found = fcntl.ioctl(asked, SIOCGIFFLAGS, struct.pack("16sH14x", b"lo", 0))
        (flags,) = struct.unpack("16xH14x", found)
        fcntl.ioctl(asked, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))


def own_temporary_folder() -> None:
    """Have an empty ``/tmp`` in a new mount namespace; a checkout that lies in it is there still."""
    made = tempfile.mkdtemp()
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", made], check=True)
    if ROOT.is_relative_to("/tmp"):
        (again := Path(made) / ROOT.relative_to("/tmp")).mkdir(parents=True)
        subprocess.run(["mount", "--rbind", ROOT, again], check=True)
    subprocess.run(["mount", "--move", made, "/tmp"], check=True)
    os.chdir(ROOT)


def inside(options: list[str]) -> int:
    """Run the tests in the namespaces that were made."""
    import pytest

    raise_loopback()
    own_temporary_folder()
    home = Path("/tmp/home")
    home.mkdir()
    for name in [each for each in os.environ if each.startswith(("RAY_", "ORLA_")) and each != INSIDE]:
        del os.environ[name]
    os.environ.update(HOME=str(home), XDG_STATE_HOME=str(home))
    os.environ.setdefault("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "adapters")]))
    words = ["-m", "ray or not ray", "-p", "no:xdist", "-p", "no:cacheprovider", *map(str, FILES), *options]
    return int(pytest.main(words))


def main() -> int:
    """Make the namespaces, and run the tests there."""
    options = sys.argv[1:]
    if os.environ.get(INSIDE):
        return inside(options)
    if why := why_not():
        print(f"skipped: {why}")
        return 1 if os.environ.get("ORLA_TEST_STRICT") else 0
    words = [*UNSHARE, sys.executable, "-m", "tests.serve.ray.run", *options]
    return subprocess.run(words, env={**os.environ, INSIDE: "1"}, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
