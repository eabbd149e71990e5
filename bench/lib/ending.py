"""How a benchmark ends that cannot go on: in a line, and with what was measured kept."""

from __future__ import annotations

from collections.abc import Callable

from openai import OpenAIError

from orla_lg.errors import OrlaError


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
