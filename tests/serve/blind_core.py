"""``orla-lg`` that sees of no process whether it has ended, as on another machine than the core's."""

from __future__ import annotations

import sys

from orla_lg.link import whereabouts

if __name__ == "__main__":
    setattr(whereabouts, "is_gone", lambda host, pid: False)  # noqa: B010 - before what imports it by name
    from orla_lg.cli import main

    sys.exit(main())
