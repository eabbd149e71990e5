"""The command line of a benchmark, and its end if it cannot go on: in a line, with what was measured kept."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from openai import OpenAIError

from orla_lg.errors import OrlaError


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Return the parser of ``bench/<name>``, whose module's docstring is the help."""
    return argparse.ArgumentParser(
        f"python -m bench.{name}", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def ended(main: Callable[[], int], stopped: str) -> int | str:
    """Return a benchmark's exit status, or in a line why there is none.

    Args:
        main: The benchmark.
        stopped: What Ctrl-C leaves behind.
    """
    fault = ""
    try:
        return main()
    except* KeyboardInterrupt:
        fault = f"\nstopped; {stopped}"
    except* (OpenAIError, OrlaError) as failed:
        fault = f"\na call failed: {failed.exceptions[0]}"
    return fault
