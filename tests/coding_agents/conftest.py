"""Turns of coding agents run in a network namespace of their own: ``make test-coding-agents``."""

from __future__ import annotations

import os

collect_ignore = [] if os.environ.get("ORLA_CODING_AGENTS") else ["test_turns.py"]
