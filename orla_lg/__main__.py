"""``python -m orla_lg`` is ``orla-lg``."""

import sys

from orla_lg.cli import main

if __name__ == "__main__":
    sys.exit(main())
