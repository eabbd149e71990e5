"""``orla-lg`` under a profiler, which begins at SIGUSR2 and writes what it saw when the process ends.

``python -m bench.scale_out.profiled FILE serve ...``
"""

from __future__ import annotations

import cProfile
import signal
import sys

from orla_lg.cli import main

if __name__ == "__main__":
    path, profile = sys.argv.pop(1), cProfile.Profile()
    signal.signal(signal.SIGUSR2, lambda *_: profile.enable())
    try:
        status = main()
    finally:
        profile.disable()
        profile.dump_stats(path)
    sys.exit(status)
