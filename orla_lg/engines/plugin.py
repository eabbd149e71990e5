"""The vLLM plugin, laid where an engine's environment finds it.

An operator installs ``orla-lg`` without its dependencies into the engine's environment. Here the environment is our
own and may be shared by several versions of us, so each engine is shown the very files that run here: a folder with
the package and its entry points, put on its ``PYTHONPATH``. The folder is named by its contents and never changes.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import tempfile
from pathlib import Path

from orla_lg.errors import EngineError
from orla_lg_llamacpp.model import cache_folder

__all__ = ["ENTRY_POINT", "PACKAGE", "SCHEDULER", "plugin_folder"]

PACKAGE = "orla_lg_vllm"
ENTRY_POINT = "orla_lg"
"""What ``VLLM_PLUGINS`` must name."""

SCHEDULER = f"{PACKAGE}.scheduler.OrlaAsyncScheduler"

_DISTRIBUTION = {
    "METADATA": "Metadata-Version: 2.1\nName: orla-lg\nVersion: 0\nSummary: The vLLM plugin of orla-lg alone.\n",
    "entry_points.txt": f"[vllm.endpoint_plugins]\n{ENTRY_POINT} = {PACKAGE}.routes:OrlaRoutes\n",
}


def plugin_folder() -> Path:
    """Return a folder that makes the plugin importable and found; made the first time.

    Raises:
        EngineError: The package is not installed here, or there is no place for the folder.
    """
    found = importlib.util.find_spec(PACKAGE)
    if found is None or not found.submodule_search_locations:
        raise EngineError(f"the plugin's package {PACKAGE} is not installed here; `pip install orla-lg` brings it")
    sources = sorted(Path(found.submodule_search_locations[0]).glob("*.py"))
    folder = cache_folder() / "plugins" / f"{PACKAGE}-{_digest(sources)}"
    if not folder.is_dir():
        try:
            _make(folder, sources)
        except OSError as exc:
            raise EngineError(f"the plugin cannot be laid into {folder}: {exc}; ORLA_CACHE_DIR moves it") from exc
    return folder


def _digest(sources: list[Path]) -> str:
    digest = hashlib.sha256(repr(_DISTRIBUTION).encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:12]


def _make(folder: Path, sources: list[Path]) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.part-", dir=folder.parent))
    try:
        (part / PACKAGE).mkdir()
        for source in sources:
            shutil.copyfile(source, part / PACKAGE / source.name)
        information = part / "orla_lg-0.dist-info"
        information.mkdir()
        for name, text in _DISTRIBUTION.items():
            (information / name).write_text(text, encoding="utf-8")
        part.rename(folder)
    except OSError:
        if not folder.is_dir():  # else another process was faster, with the same files
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
