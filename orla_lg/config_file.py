"""Where a configuration lies: the file that ``ORLA_CONFIG`` names, or the nearest ``orla.toml``."""

from __future__ import annotations

import os
from pathlib import Path

CONFIG_NAME = "orla.toml"


def find_file() -> str | Path | None:
    """Return the configuration's file: that of ``ORLA_CONFIG``, or ``orla.toml`` here or above."""
    if named := os.environ.get("ORLA_CONFIG"):
        return named
    here = Path.cwd()
    return next((each for folder in (here, *here.parents) if (each := folder / CONFIG_NAME).is_file()), None)
